"""Problems whose cost follows the longest path: levels of a ciphertext. See `solve.levels`."""

from __future__ import annotations

from collections.abc import Mapping

from tightrope.solve.levels import Action, Chain, Node
from tightrope.solve.levels import least_loss as least
from tightrope.types import Problem


def levels(problem: Problem, chosen: Mapping[str, int]) -> float:
    """Of the longest path under these options, one per site."""
    cost = {t.site: float(t.cost["ckks_levels"][chosen[t.site]]) for t in problem.tables}
    depth = {"": 0.0}
    for step in problem.path:
        above = max(depth[value] for value in step.inputs)
        depth[step.name] = above + step.levels + cost.get(step.name, 0.0)
    return depth[problem.path[-1].name]


def nodes(problem: Problem) -> tuple[Node, ...]:
    """The graph as the dynamic programme reads it; an action per option, its label and summed loss."""
    tables = {t.site: t for t in problem.tables}
    made = []
    for step in problem.path:
        actions: tuple[Action, ...] = (Action("", step.levels),)
        if step.name in tables:
            table = tables[step.name]
            actions = tuple(
                Action(label, step.levels + int(n), float(loss))
                for label, n, loss in zip(
                    table.labels, table.cost["ckks_levels"], table.loss.sum(0), strict=True
                )
            )
        made.append(Node(step.name, step.inputs, actions))
    return tuple(made)


def least_loss(problem: Problem, limit: float) -> dict[str, int]:
    """The option of every site that together lose least within `limit` levels. Raises BudgetError."""
    most = max(t.cost["ckks_levels"].max() for t in problem.tables)
    enough = sum(step.levels for step in problem.path) + len(problem.tables) * int(most)
    top = int(min(limit, enough))
    found = least(nodes(problem), Chain(top=top), "levels", top)
    return {t.site: found.chosen[t.site] for t in problem.tables}
