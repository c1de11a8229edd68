"""Train polynomials in turns, as SmartPAF (2024, sections 4.2 and 4.3) does, instead of everything at once.

*Progressive*: activations become polynomials one after another, in the order of the network. In its turn, a
polynomial learns together with the weights between it and the one before. *Alternate*: coefficients and
weights learn in groups of epochs of their own, as long as either gets better on validation images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

from torch import fx, nn

from tightrope import checkpoint as disk
from tightrope.data import Data
from tightrope.errors import InputError
from tightrope.evaluate import accuracy, recalibrate
from tightrope.finetune import calibration, finetune, identity
from tightrope.nn import PolynomialActivation
from tightrope.reach import steerable
from tightrope.recipe import Recipe

SCHEDULES = ("joint", "progressive", "alternate", "progressive+alternate")
GROUPS = 4  # of epochs in an alternating turn, at most
GROUP_SEEDS = 1009
COEFFICIENTS, WEIGHTS = "coefficients", "weights"
Record = dict[str, float | int | str]


@dataclass(frozen=True)
class Turn:
    """Names of parameters: what learns, and of polynomial activations: which are not there yet."""

    coefficients: tuple[str, ...]
    weights: tuple[str, ...]
    later: tuple[str, ...]


@dataclass
class _Progress:
    """How far a run is. `phase` and what follows are of an alternating turn."""

    turn: int = 0
    groups: int = 0  # all that were trained
    epochs: int = 0  # all that were logged
    spent: int = 0  # of this turn's
    phase: str = COEFFICIENTS
    improved: bool = True  # since the phase began; the first one may fail
    best: float = -1.0  # validation accuracy of the weights that the turn has; below 0 before it began


def train(
    model: fx.GraphModule,
    without: Callable[[Collection[str]], nn.Module],
    data: Data,
    schedule: str,
    *,
    teacher: nn.Module | None = None,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    checkpoint: Path | None = None,
    log: Callable[[Record], None] | None = None,
) -> nn.Module:
    """`finetune`, in turns: a trained copy of `model`, in evaluation mode on the CPU.

    `without(names)` is the same network with these of its polynomial activations still exact. All turns
    together take `Recipe.epochs`; an alternating one ends early when neither coefficients nor weights
    improve. Every group of epochs has a warm-up and a cosine of its own, and ends with averaged weights and
    batch-norm statistics for them; in alternating turns, those of the best validation accuracy are kept. The
    published machine also changes phases when the best epoch of a group is an early one: here a group has
    one result.

    Records for `log` are those of `finetune`, epochs counted over all turns; they name the turn and what
    learns. The run is saved after every group of epochs. Raises what `finetune` raises, and InputError for a
    network without polynomials, for several processes and for an unknown schedule.
    """
    if schedule not in SCHEDULES[1:]:
        raise InputError("no such schedule", got=schedule, allowed=", ".join(SCHEDULES))
    if recipe.devices * recipe.nodes > 1:
        raise InputError("turns are for one process", got=f"{recipe.devices * recipe.nodes} devices")
    turns = divide(model, progressive="progressive" in schedule)
    alternate = "alternate" in schedule
    share = recipe.epochs / len(turns) / (GROUPS if alternate else 1)
    run = identity(model, teacher, data, recipe) | {"schedule": schedule}
    found = None if checkpoint is None else disk.load(checkpoint, run)
    at = _Progress(**({} if found is None else found.progress))
    state = dict(model.state_dict() if found is None else found.tensors)

    def learn(net: nn.Module, names: Collection[str], what: str) -> nn.Module:
        if not names:
            return net
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(name in names)
        own = replace(recipe, epochs=share, seed=(recipe.seed * GROUP_SEEDS + at.groups) % 2**32)

        where: Record = {"turn": at.turn + 1, "learns": what}

        def note(record: Record) -> None:
            at.epochs += 1
            if log is not None:
                log(where | record | {"epoch": at.epochs})

        at.groups += 1
        return finetune(net, data, teacher=teacher, recipe=own, log=note)

    def save(net: nn.Module) -> None:
        state.update(net.state_dict())
        if checkpoint is not None:
            disk.save(checkpoint, run, disk.Checkpoint(state, asdict(at)))

    if found is None:
        save(model)  # a place that cannot be written shows before the work, not after it
    for turn in turns[at.turn :]:
        net = without(turn.later)
        net.load_state_dict({name: state[name] for name in net.state_dict()})
        if alternate:
            net = _alternate(net, turn, data, recipe, at, learn, save)
        else:
            net = learn(net, turn.coefficients + turn.weights, "both")
        at = _Progress(at.turn + 1, at.groups, at.epochs)
        save(net)
    result = copy.deepcopy(model).eval()
    result.load_state_dict(state)
    return result


def _alternate(
    net: nn.Module,
    turn: Turn,
    data: Data,
    recipe: Recipe,
    at: _Progress,
    learn: Callable[[nn.Module, Collection[str], str], nn.Module],
    save: Callable[[nn.Module], None],
) -> nn.Module:
    """Groups of epochs for coefficients and weights by turns, until both fail or the epochs are used."""
    names: Mapping[str, Collection[str]] = {COEFFICIENTS: turn.coefficients, WEIGHTS: turn.weights}
    if at.best < 0:
        recalibrate(net, calibration(data, recipe))
        at.best = accuracy(net, data, "validation")
    while at.spent < GROUPS:
        candidate = learn(net, names[at.phase], at.phase)
        at.spent += 1
        reached = accuracy(candidate, data, "validation")
        if reached > at.best:
            net, at.best, at.improved = candidate, reached, True
        elif at.improved and turn.weights:
            at.phase, at.improved = WEIGHTS if at.phase == COEFFICIENTS else COEFFICIENTS, False
        else:
            break
        save(net)
    return net


def divide(net: fx.GraphModule, *, progressive: bool) -> list[Turn]:
    """The turns of a traced network: one for each of its polynomial activations, or a single one for all.

    Weights learn in the turn of the first polynomial after them, in the order of execution; those after the
    last polynomial in its turn. Coefficients of minimax composites do not learn (`reach.steerable`).
    Raises InputError for a network without polynomials.
    """
    polynomials = {n: m for n, m in net.named_modules() if isinstance(m, PolynomialActivation)}
    order = [name for name in _called(net) if name in polynomials]
    if not order:
        raise InputError(
            "only polynomials are trained in turns, and the network has none",
            fix="--schedule joint",
        )
    owner: dict[str, int] = {}  # of a parameter, by the turn it learns in
    turn = 0
    for name in _called(net):
        if name in polynomials:
            turn += 1
        else:
            for parameter, _ in net.get_submodule(name).named_parameters():
                owner.setdefault(f"{name}.{parameter}", min(turn, len(order) - 1))
    inside = {f"{name}.{p}" for name, m in polynomials.items() for p, _ in m.named_parameters()}
    coefficients = [
        tuple(f"{name}.{p}" for p, _ in polynomials[name].named_parameters() if steerable(polynomials[name]))
        for name in order
    ]
    weights: list[list[str]] = [[] for _ in order]
    for parameter, _ in net.named_parameters():
        if parameter not in inside:
            weights[owner.get(parameter, len(order) - 1)].append(parameter)
    if not progressive:
        return [Turn(tuple(chain(*coefficients)), tuple(chain(*weights)), ())]
    return [Turn(coefficients[k], tuple(weights[k]), tuple(order[k + 1 :])) for k in range(len(order))]


def _called(net: fx.GraphModule) -> Iterator[str]:
    """The modules of a traced network in the order of their first call."""
    return iter(dict.fromkeys(str(node.target) for node in net.graph.nodes if node.op == "call_module"))
