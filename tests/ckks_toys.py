"""The ckks runtime on rings that are small, fast and insecure: for tests alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from tightrope.runtimes.ckks import CKKS
from tightrope.runtimes.ckks.compiler import Nodes
from tightrope.runtimes.ckks.parameters import Parameters, insecure_test_parameters, max_refresh
from tightrope.runtimes.ckks.placement import choose_levels


@dataclass(frozen=True, kw_only=True)
class ToyCKKS(CKKS):
    ring: int = 11

    def parameters(self, levels: int, nodes: Nodes) -> Parameters:
        offer = partial(insecure_test_parameters, log_n=self.ring, scale_bits=self.scale_bits)
        if self.bootstrap != "always":
            return offer(levels)
        most, slots = max_refresh(self.scale_bits), 1 << (self.ring - 1)
        found = choose_levels(nodes(slots), partial(offer, bootstrap=True), most, self.refresh_levels)
        return found or offer(levels)
