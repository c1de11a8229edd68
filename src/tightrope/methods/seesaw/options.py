"""Which pools and ReLUs of a supernet a budget pays for: a knapsack over measured losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from tightrope.errors import BudgetError
from tightrope.methods.seesaw.decide import Wanted, allowed, cheapest, floor, most_macs, settle
from tightrope.methods.seesaw.prices import Prices
from tightrope.methods.seesaw.space import Architecture
from tightrope.methods.seesaw.supernet import Supernet
from tightrope.solve.exact import Picked, fit
from tightrope.solve.select import Selection, select
from tightrope.types import Budget, Cost, FloatArray, Limit, Problem, Table


def project(
    net: Supernet, prices: Prices, wanted: Wanted, judge: Callable[[], float], *, rounds: int
) -> list[int]:
    """The options of every choice, within the limit for certain: the likeliest first, then by measuring.

    In each round every option is tried alone and the knapsack solved with what the loss then was; the answer
    counts where it is really better. What is left of the limit goes to ReLUs. Raises BudgetError when no
    options meet the limit.
    """
    shares = {site: c.probabilities().detach().cpu().double() for site, c in net.choices.items()}
    likely = {site: -p.clamp_min(1e-30).log().numpy() for site, p in shares.items()}
    options, left = _solve(net, prices, wanted, likely), allowed(net, wanted)
    settle(net, options)
    loss, measured = judge(), likely
    for _ in range(rounds):
        measured = {}
        for n, (site, choice) in enumerate(net.choices.items()):
            row = np.full(len(choice.options), loss)
            for k in left[n]:
                if k != options[n]:
                    settle(net, [*options[:n], k, *options[n + 1 :]])
                    row[k] = judge()
            measured[site] = row - loss
        other = _solve(net, prices, wanted, measured)
        settle(net, other)
        found = judge()
        if other == options or found >= loss:
            break
        options, loss = other, found
    options = _filled(net, prices, wanted, options, measured)
    settle(net, options)
    return options


def _solve(net: Supernet, prices: Prices, wanted: Wanted, losses: dict[str, FloatArray]) -> list[int]:
    tables, kept = [], []
    least = cheapest(net, prices, wanted)
    fixed = prices.whole(net.architecture(least))
    room = (wanted.macs - most_macs(net, prices)) / max(len(net.joins), 1)  # for a convolution as a pool
    for (site, choice), free in zip(net.choices.items(), allowed(net, wanted), strict=True):
        every = [prices.option(site, option) for option in choice.options]
        most = max(room, min(cost.macs for cost in every))
        left = [k for k in free if every[k].macs <= most]
        costs, options = [every[k] for k in left], [choice.options[k] for k in left]
        labels = tuple(f"{pool} {'relu' if relu else 'identity'}".strip() for pool, relu in options)
        priced = {
            m: np.array([getattr(cost, m) for cost in costs], np.float64) for m in {"drelus", wanted.metric}
        }
        tables.append(Table(site, labels, losses[site][left][None], priced))
        kept.append(left)
        # which the cheapest network has already
        fixed = fixed + Cost(**{m: -float(min(row)) for m, row in priced.items()})
    positive = Cost(**{m: max(0.0, getattr(fixed, m)) for m in {"drelus", wanted.metric}})
    problem = Problem(tuple(tables), positive, Cost())
    budget = Budget((Limit(wanted.metric, wanted.limit),))

    def picks(picked: Picked) -> list[int]:
        return [left[int(picked[table.site][0])] for table, left in zip(tables, kept, strict=True)]

    def exact(picked: Picked) -> Cost:
        return prices.whole(net.architecture(picks(picked)))

    try:
        found: Selection = (
            select(problem, budget) if wanted.metric == "drelus" else fit(problem, budget, exact).selection
        )
    except BudgetError as error:
        words = (
            f"{prices.space.least:,} DReLUs or more: those of its aggregates, whatever is chosen"
            if wanted.metric == "drelus"
            else str(error).partition("allowed: ")[2].partition("\n")[0]
        )
        raise floor(prices, wanted.metric, wanted.limit, words) from error
    return _spared(net, prices, wanted, picks(found.picked), least, losses)


def _filled(
    net: Supernet, prices: Prices, wanted: Wanted, options: list[int], losses: dict[str, FloatArray]
) -> list[int]:
    """More ReLUs while the limits have room for one, the largest first, then where the loss grows least.

    A ReLU that does harm in the supernet does so to weights that were trained without it: in a network that
    is trained on, more are better.
    """
    waiting = []
    for n, ((site, choice), left) in enumerate(zip(net.choices.items(), allowed(net, wanted), strict=True)):
        pool, relu = choice.options[options[n]]
        for k in left:
            if choice.options[k] == (pool, True) and not relu:
                loss = float(losses[site][k] - losses[site][options[n]])
                waiting.append((-prices.option(site, ("", True)).drelus, loss, n, k))
    for _, _, n, k in sorted(waiting):
        other = [*options[:n], k, *options[n + 1 :]]
        if _meets(net.architecture(other), prices, wanted):
            options = other
    return options


def _meets(network: Architecture, prices: Prices, wanted: Wanted) -> bool:
    if wanted.metric == "drelus":  # without the whole network, which is slow, where that will do
        fits = prices.space.drelus(network) <= wanted.limit
        if not fits or wanted.macs == math.inf:
            return fits
    whole = prices.whole(network)
    return bool(getattr(whole, wanted.metric) <= wanted.limit and whole.macs <= wanted.macs)


def _spared(
    net: Supernet,
    prices: Prices,
    wanted: Wanted,
    options: list[int],
    least: Sequence[int],
    losses: dict[str, FloatArray],
) -> list[int]:
    """The cheapest options in the place of those that are worth least, while there are too many `macs`.

    A ReLU costs multiplications too, where its block would merge with the next.
    """
    if wanted.macs == math.inf:
        return options
    sites = [n for n in range(len(options)) if options[n] != least[n]]
    rows = list(losses.values())
    for n in sorted(sites, key=lambda n: float(rows[n][least[n]] - rows[n][options[n]])):
        if prices.whole(net.architecture(options)).macs <= wanted.macs:
            break
        options[n] = least[n]
    return options
