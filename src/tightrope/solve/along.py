"""Problems whose cost follows the longest path: levels of a ciphertext. See `solve.levels`."""

from __future__ import annotations

from collections.abc import Mapping

from tightrope.solve.levels import Action, Chain, Node, evaluate
from tightrope.solve.levels import least_loss as least
from tightrope.types import Problem, Step, Table


def levels(problem: Problem, chosen: Mapping[str, int]) -> float:
    """Of the longest path under these options, one per site."""
    tables = {t.site: t for t in problem.tables}
    made = [
        Node(s.name, s.inputs, (_action(s, tables.get(s.name), chosen.get(s.name, 0)),)) for s in problem.path
    ]
    return float(evaluate(made, Chain(top=_enough(made)), dict.fromkeys((n.name for n in made), 0)).levels)


def nodes(problem: Problem) -> tuple[Node, ...]:
    """The graph as the dynamic programme reads it; an action per option, its label and summed loss."""
    tables = {t.site: t for t in problem.tables}
    made = []
    for step in problem.path:
        table = tables.get(step.name)
        count = len(table.labels) if table else 1
        made.append(Node(step.name, step.inputs, tuple(_action(step, table, k) for k in range(count))))
    return tuple(made)


def least_loss(problem: Problem, limit: float) -> dict[str, int]:
    """The option of every site that together lose least within `limit` levels. Raises BudgetError."""
    made = nodes(problem)
    top = int(min(limit, _enough(made)))
    found = least(made, Chain(top=top), "levels", top)
    return {t.site: found.chosen[t.site] for t in problem.tables}


def _action(step: Step, table: Table | None, k: int) -> Action:
    merge = step.merge[k if len(step.merge) > 1 else 0]
    if table is None:
        return Action("", step.levels, merge=merge)
    spent = step.levels + int(table.cost["ckks_levels"][k])
    return Action(table.labels[k], spent, float(table.loss[:, k].sum()), merge=merge)


def _enough(made: tuple[Node, ...] | list[Node]) -> int:
    """Levels for any choice: whatever is read may have to be made first."""
    return sum(max(action.levels for action in node.actions) + 1 for node in made)
