"""The ckks runtime on rings that are small, fast and insecure: for tests alone."""

from __future__ import annotations

from dataclasses import dataclass

from tightrope.runtimes.ckks import CKKS
from tightrope.runtimes.ckks.parameters import Parameters, insecure_test_parameters


@dataclass(frozen=True, kw_only=True)
class ToyCKKS(CKKS):
    ring: int = 11

    def parameters(self, levels: int) -> Parameters:
        return insecure_test_parameters(levels, log_n=self.ring, scale_bits=self.scale_bits)
