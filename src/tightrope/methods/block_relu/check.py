"""The fast losses against exact ones: random options, on the same images, site by site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from tightrope import kept
from tightrope.graph import Graph
from tightrope.methods import Progress
from tightrope.methods.block_relu.distortion import Losses, Suffix, exact, upper_of
from tightrope.nn.block_relu import Patch
from tightrope.shard import Shard
from tightrope.types import Json, Site

Options = Mapping[str, list[Patch]]


@dataclass(frozen=True)
class Probe:
    """Option `k` of one channel of a site."""

    site: Site
    channel: int
    k: int


def probes(sites: Sequence[Site], options: Options, count: int, seed: int) -> list[Probe]:
    """So many random options that change something."""
    pool = [
        Probe(s, c, k)
        for s in sites
        for c in range(s.shape[0])
        for k, p in enumerate(options[s.name])
        if p != (1, 1) or s.kind == "relu6"
    ]
    return [pool[i] for i in np.random.default_rng(seed).permutation(len(pool))[:count]]


def check(
    graph: Graph,
    picked: Sequence[Probe],
    options: Options,
    losses: Mapping[str, Losses],
    images: Callable[[], list[Tensor]],
    *,
    workdir: Path | None,
    key: str,
    progress: Progress,
    shard: Shard,
) -> dict[str, Json]:
    """Rank correlation (Spearman) of fast and exact losses, plain and repaired; the pairs themselves.

    The exact repaired loss is that of the channel times the factor that the fast one is the loss of. `images`
    is called only where a site has no saved values.
    """
    if len(picked) < 2:
        return {}
    seen: list[Tensor] = []
    measured = np.empty((len(picked), 2))
    sites = list(dict.fromkeys(probe.site for probe in picked))
    for done, site in enumerate(sites):
        mine = [i for i, probe in enumerate(picked) if probe.site is site]
        of_these = f"{key} {[(picked[i].channel, picked[i].k) for i in mine]}"
        saved = kept.read(workdir, _name(site), of_these)
        shard.barrier()  # nobody writes before everybody has read
        if saved is None:
            seen = seen or images()
            sums = torch.zeros(len(mine) + 1, 2, dtype=torch.float64)  # the last row counts images
            for x in seen:
                suffix, upper = Suffix(graph, site, x), upper_of(graph, site)
                sums[-1] += len(x)
                for row, i in enumerate(mine):
                    c, k = picked[i].channel, picked[i].k
                    for column, factor in enumerate((1.0, float(losses[site.name].factor[c, k]))):
                        loss = exact(suffix, c, options[site.name][k], upper, factor)
                        sums[row, column] += len(x) * loss
            sums = shard.total(sums)
            saved = {"exact": (sums[:-1] / sums[-1]).numpy()}
            if shard.first:
                kept.write(workdir, _name(site), of_these, saved)
        measured[mine] = saved["exact"]
        progress("exact check", done + 1, len(sites))
    found: dict[str, Json] = {"verified": len(picked)}
    for column, (kind, suffix_) in enumerate((("raw", ""), ("repaired", "_repaired"))):
        fast = [float(getattr(losses[p.site.name], kind)[p.channel, p.k]) for p in picked]
        found[f"spearman{suffix_}"] = _spearman(np.array(fast), measured[:, column])
        found[f"check{suffix_}"] = [[a, float(b)] for a, b in zip(fast, measured[:, column], strict=True)]
    return found


def _name(site: Site) -> str:
    return f"{site.name}.check"


def _spearman(fast: NDArray[np.float64], exact: NDArray[np.float64]) -> float:
    return float(spearmanr(fast, exact).statistic)
