"""From a trained supernet to one network: which operators go; `options` says what else a budget pays for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tightrope.errors import BudgetError
from tightrope.methods.seesaw.prices import Prices, burden
from tightrope.methods.seesaw.supernet import Mixture, Supernet

ROOM = 0.7  # of what a limit leaves beyond the cheapest network may go to operators
LEAST = 1e-12
CLOSE = 1e-3  # prices that differ by a smaller share are the same


@dataclass
class Judge:
    """Cross-entropy of the supernet as it is set, on a few held-out batches."""

    net: Supernet
    batches: Sequence[tuple[Tensor, Tensor]]

    def __call__(self) -> float:
        losses, seen = 0.0, 0
        with batch_statistics(self.net), torch.no_grad():
            for x, y in self.batches:
                losses += float(F.cross_entropy(self.net(x).float(), y)) * len(y)
                seen += len(y)
        return losses / seen


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Batch-norm by the batch itself, since running statistics are of other branches; these stay."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(m, m.training, m.momentum) for m in norms]
    training = model.training
    try:
        model.train()
        for m in norms:
            m.momentum = 0.0
        yield
    finally:
        model.train(training)
        for m, mode, momentum in before:
            m.momentum = momentum
            m.train(mode)


def settle(net: Supernet, options: Sequence[int] | None = None) -> None:
    """All operators that are left, and these options; None: the likeliest."""
    for mixture in net.mixtures:
        mixture.picked = mixture.alive
    choices = net.choices.values()
    if options is None:
        options = [int(c.logits.argmax()) for c in choices]
    for choice, k in zip(choices, options, strict=True):
        choice.fix(k)


def importances(mixture: Mixture, judge: Callable[[], float]) -> dict[int, float]:
    """By how much the loss grows without each operator, the others renormalised; of some, if few are left."""
    felt = {}
    base = judge()
    for k in mixture.alive:
        rest = [j for j in mixture.alive if j != k]
        if any(mixture.names[j] != "none" for j in rest):
            mixture.picked = rest
            felt[k] = judge() - base
    mixture.picked = mixture.alive
    return felt


def sensitivities(
    net: Supernet, batches: Sequence[tuple[Tensor, Tensor]], size: int
) -> list[dict[int, float]]:
    """About `importances` of every mixture, by one backward pass over the images, `size` at a time.

    With a gate of 1 on the share s_k of each branch, the shares renormalised, an image's loss grows by
    d_k = -dL/dg_k / (1 - s_k) to first order when branch k goes (Molchanov et al., Importance Estimation for
    Neural Network Pruning, CVPR 2019, equation 8, with its sign: most operators do no harm, some do). Half
    the mean of d_k^2 is the second order, with the Fisher's in the place of the Hessian (Theis et al. 2018).
    """
    growth = [torch.zeros(len(m.picked), device=m.weights.device) for m in net.mixtures]
    rests = [(1 - m.coefficients().detach()).clamp_min(LEAST) for m in net.mixtures]
    parts = [
        part for x, y in batches for part in zip(torch.split(x, size), torch.split(y, size), strict=True)
    ]
    try:
        with batch_statistics(net):
            for x, y in parts:
                for m in net.mixtures:
                    m.gates = torch.ones(len(x), len(m.picked), device=x.device, requires_grad=True)
                loss = F.cross_entropy(net(x).float(), y, reduction="sum")
                slopes = torch.autograd.grad(loss, [m.gates for m in net.mixtures if m.gates is not None])
                for total, slope, rest in zip(growth, slopes, rests, strict=True):
                    step = -slope / rest
                    total += (step + 0.5 * step.square()).sum(0)
    finally:
        for m in net.mixtures:
            m.gates = None
    seen = sum(len(y) for _, y in parts)
    return [
        dict(zip(m.picked, (total / seen).tolist(), strict=True))
        for m, total in zip(net.mixtures, growth, strict=True)
    ]


def expendable(mixture: Mixture, felt: dict[int, float], worth: Mapping[int, float]) -> dict[int, float]:
    """`felt` without the real operator of the greatest `worth`, so that one is always left."""
    real = [k for k in mixture.alive if mixture.names[k] != "none"]
    last = max(real, key=lambda k: worth.get(k, 0.0))
    return {k: loss for k, loss in felt.items() if k != last}


@dataclass(frozen=True)
class Wanted:
    """`metric <= limit`, at most `macs` multiplications, linear work at most `balance` times the other.

    `relus`: which blocks have a ReLU, where a map says so.
    """

    metric: str
    limit: float
    macs: float
    balance: float
    relus: tuple[bool, ...] | None = None

    def comparisons(self, prices: Prices) -> float:
        """About how many DReLUs the limit pays for; no more than the space has."""
        one = prices.option("block1", ("", True))
        paid = self.limit * one.drelus / max(float(getattr(one, self.metric)), LEAST)
        return min(paid, prices.space.most)

    def least(self, prices: Prices, metric: str) -> float:
        """Of the cheapest network."""
        return prices.least(metric, self.relus)

    def room(self, prices: Prices) -> float:
        """Of the limit, for a network whose options are the cheapest."""
        least = self.least(prices, self.metric)
        return least + ROOM * (self.limit - least)


def prune(
    net: Supernet,
    prices: Prices,
    wanted: Wanted,
    judge: Callable[[], float],
    options: Sequence[int] | None = None,
) -> bool:
    """Drop operators by what they are worth against what they cost, until the linear work fits.

    What an operator costs is what its block costs more with it, merged with the others: for the balance
    those that disappear into a larger kernel stay. Where one operator a block is still too much for a
    limit, the cheapest operators take their places. Without `options` the cheapest count, and a part of the
    limit is left to others. False if even one operator a block is too much for the balance.
    """
    stages = prices.space.stages()
    felt: dict[int, dict[int, float]] = {}
    while excess := _excess(net, prices, wanted, options):
        settle(net, options)
        best: tuple[float, int, int] | None = None
        for b, (stage, mixture) in enumerate(zip(stages, net.mixtures, strict=True)):
            if b not in felt:
                felt[b] = importances(mixture, judge)
            for k, saved in _savings(prices, stage, mixture, felt[b], excess).items():
                loss = felt[b][k]
                worth = loss / saved if loss > 0 else loss * saved
                if best is None or worth < best[0]:
                    best = (worth, b, k)
        if best is None:
            break
        _, b, k = best
        net.mixtures[b].drop(k)
        del felt[b]
    if over := _exceeded(net, prices, wanted, options):
        _swap(net, prices, wanted, options, over)
    return _balance(net, prices, wanted, options) <= wanted.balance


def _savings(
    prices: Prices, stage: int, mixture: Mixture, felt: dict[int, float], excess: str
) -> dict[int, float]:
    """Of the operators that may go from a block, the milliseconds that this saves, or next to nothing."""
    names, work = mixture.names, prices.work if excess == "balance" else prices.time
    now = work(stage, _real(mixture))
    saved = {k: max(now - work(stage, _real(mixture, k)), LEAST) for k in felt}
    if excess == "balance":  # two of the same size save only together
        return {
            k: ms
            for k, ms in saved.items()
            if ms > CLOSE * now or (names[k] != "none" and work(stage, [names[k]]) > now - CLOSE * now)
        }
    # the cheapest operator is the one to be left
    cheap = {k: -float(getattr(prices.block(stage, [names[k]]), excess)) for k in felt if names[k] != "none"}
    return {k: max(saved[k], CLOSE * now) for k in expendable(mixture, felt, cheap)}


def _swap(net: Supernet, prices: Prices, wanted: Wanted, options: Sequence[int] | None, metric: str) -> None:
    """The operator of the cheapest network in the place of a block's own, where most is saved first."""
    names = [block.operators[0] for block in prices.cheapest(metric, wanted.relus).blocks]
    saved = [
        float(getattr(prices.block(stage, _real(m)), metric) - getattr(prices.block(stage, [name]), metric))
        for stage, m, name in zip(prices.space.stages(), net.mixtures, names, strict=True)
    ]
    for b in sorted(range(len(saved)), key=lambda b: -saved[b]):
        if not _exceeded(net, prices, wanted, options):
            return
        mixture = net.mixtures[b]
        mixture.alive = mixture.picked = [mixture.names.index(names[b])]


def _real(mixture: Mixture, without: int = -1) -> list[str]:
    return [mixture.names[k] for k in mixture.alive if k != without and mixture.names[k] != "none"]


def most_macs(net: Supernet, prices: Prices) -> float:
    """Where every block has a ReLU; too many where a transition merges with the block after it."""
    blocks = zip(prices.space.stages(), net.mixtures, strict=True)
    return prices.frame_macs + sum(prices.block(stage, _real(m)).macs for stage, m in blocks)


def _excess(net: Supernet, prices: Prices, wanted: Wanted, options: Sequence[int] | None) -> str:
    """The quantity that is still too much, `balance` for that; the whole network counts last, being slow."""
    if most_macs(net, prices) > wanted.macs:
        return "macs"
    if _balance(net, prices, wanted, options) > wanted.balance:
        return "balance"
    if options is None and wanted.metric != "drelus":
        about = prices.linear([_real(m) for m in net.mixtures], wanted.metric, wanted.relus)
        if about > wanted.room(prices):
            return wanted.metric
    return _exceeded(net, prices, wanted, options)


def _exceeded(net: Supernet, prices: Prices, wanted: Wanted, options: Sequence[int] | None) -> str:
    """The limit that the whole network with these options exceeds, by the exact price; "" for none."""
    linear = wanted.metric != "drelus"
    if wanted.macs == math.inf and not linear:
        return ""
    exact = prices.whole(net.architecture(options or cheapest(net, prices, wanted)))
    if exact.macs > wanted.macs:
        return "macs"
    room = wanted.limit if options is not None or not linear else wanted.room(prices)
    return wanted.metric if linear and getattr(exact, wanted.metric) > room else ""


def _balance(net: Supernet, prices: Prices, wanted: Wanted, options: Sequence[int] | None) -> float:
    network = net.architecture(options or [0] * len(net.choices))
    return prices.balance(
        network, wanted.comparisons(prices) if options is None else prices.space.drelus(network)
    )


def allowed(net: Supernet, wanted: Wanted) -> list[list[int]]:
    """Of every choice the options that a ReLU map leaves."""
    left = [list(range(len(choice.options))) for choice in net.choices.values()]
    for k, on in enumerate(wanted.relus or ()):
        left[k] = [int(on)]
    return left


def cheapest(net: Supernet, prices: Prices, wanted: Wanted) -> list[int]:
    """The option of every choice that costs least."""

    def cost(site: str, k: int) -> tuple[float, float]:
        price = prices.option(site, net.choices[site].options[k])
        return float(getattr(price, wanted.metric)), burden(price)

    every = zip(net.choices, allowed(net, wanted), strict=True)
    return [min(left, key=lambda k, site=site: cost(site, k)) for site, left in every]  # type: ignore[misc]


def floor(prices: Prices, metric: str, limit: float, allowed: str) -> BudgetError:
    """The error for a limit that no network, or not the one that was found, meets."""
    fix = "a larger budget or a smaller --set width=VALUE"
    if metric == "macs":
        fix = "a larger limit on macs, a smaller --set width=VALUE, fewer blocks, or cheaper operators"
    elif metric == "drelus" and prices.space.least:
        fix = "--set aggregates=searched: their ReLUs and pools become choices"
    return BudgetError(
        "no network of the space meets the budget", got=f"{metric}<={limit:,.15g}", allowed=allowed, fix=fix
    )
