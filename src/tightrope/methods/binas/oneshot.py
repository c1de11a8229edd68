"""One-shot training: the heaviest network, then all networks of the space at once, taught by it.

Heaviest first; its channels are ranked; then every sample of a batch goes through a network of its own and
learns from the labels, from the outputs of the heaviest network and from its maps at the stem and after every
stage (BINAS, Nayman et al. 2021, section 4; the published losses and weights: cross-entropy with smoothed
labels, Kullback-Leibler divergence, and the mean squares of the maps summed and divided by 50).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from tightrope import checkpoint as disk
from tightrope.data import Data
from tightrope.errors import BundleError, InputError
from tightrope.finetune import finetune
from tightrope.hints import Watch, mean_square
from tightrope.methods.binas.extract import inherit
from tightrope.methods.binas.ranking import importance, reorder
from tightrope.methods.binas.rows import ANEW
from tightrope.methods.binas.space import Space
from tightrope.methods.binas.supernet import Norms, Supernet, WithLargest
from tightrope.models.mobilenet import MobileNet, mobilenet
from tightrope.recipe import Recipe
from tightrope.types import Json

RANKING_BATCH = 64
HEAVIEST_FILE = "heaviest.safetensors"
DIVISOR = 50  # of the summed squares of the maps (`ikd_dividor`)
HEAVIEST = Recipe(epochs=2, batch_size=128, lr=0.1, label=1.0, smoothing=0.1, distill=0.0, hints=0.0)
ELASTIC = Recipe(
    epochs=12,
    batch_size=128,
    lr=0.05,
    label=1.0,
    smoothing=0.1,
    distill=1.0,
    temperature=1.0,
    hints=1 / DIVISOR,
)
Log = Callable[[dict[str, float | int | str]], None]


@dataclass(frozen=True, kw_only=True)
class OneShot:
    """How to train: `Recipe`s of both phases, `norms` of the supernet, the share of the training images that
    ranks channels. `elastic.hints` weighs the sum over the stem and the stages. `largest`: share of every
    elastic batch that goes through the largest network (`WithLargest`), which random ones leave behind; 0 as
    published.

    Raises InputError for a share outside (0, 1], for `largest` outside [0, 1).
    """

    heaviest: Recipe = HEAVIEST
    elastic: Recipe = ELASTIC
    norms: Norms = "path"
    ranking: float = 0.1
    largest: float = 0.125

    def __post_init__(self) -> None:
        if not 0 <= self.largest < 1:
            raise InputError(
                "the share of a batch for the largest network", got=self.largest, allowed="from 0, below 1"
            )
        if not 0 < self.ranking <= 1:
            raise InputError(
                "the share of images that rank channels", got=self.ranking, allowed="above 0, up to 1"
            )


def train(
    space: Space,
    data: Data,
    settings: OneShot = OneShot(),
    *,
    folder: Path,
    log: Log | None = None,
) -> Supernet:
    """The trained supernet, in evaluation mode on the CPU. The test split is not read.

    `folder` keeps HEAVIEST_FILE and supernet.safetensors, and where each phase stands: a call with the
    same arguments goes on from there, to the same losses and weights, and a finished run is only loaded (with
    its heaviest network trained again where that file is gone).
    `log` gets the records of `finetune`, with "phase": heaviest or elastic; in the second, accuracies are
    those of random networks.

    Raises InputError for data that does not fit the space, and what `finetune` raises; BundleError for a
    folder of another run.
    """
    if (data.input_shape, len(data.classes)) != (space.input_shape, space.classes):
        raise InputError(
            f"the data does not fit the space {space.name}",
            where=data.name,
            got=f"{data.input_shape}, {len(data.classes)} classes",
            allowed=f"{space.input_shape}, {space.classes} classes",
        )
    folder.mkdir(parents=True, exist_ok=True)
    first: dict[str, Json] = {
        "data": {"name": data.name, "train": data.size("train")},
        "heaviest": asdict(settings.heaviest),
        "ranking": settings.ranking,
    }
    both = first | {
        "elastic": asdict(settings.elastic),
        "norms": settings.norms,
        "largest": settings.largest,
    }
    done = _finished(folder / "supernet.safetensors", space, both)
    heaviest = _heaviest(space, data, settings, first, folder, log)
    if done is not None:
        return _restored(done, space)
    start = inherit(heaviest, space, settings.norms)
    start.drawn = WithLargest(space, settings.largest) if settings.largest else None
    supernet = finetune(
        start,
        data,
        teacher=heaviest,
        recipe=replace(settings.elastic, hints=settings.elastic.hints * len(watched(space))),
        watch=Watch(watched(space), mean_square),
        checkpoint=folder / "elastic.part",
        log=_named(log, "elastic"),
    )
    assert isinstance(supernet, Supernet)
    supernet.drawn = None
    _save(folder / "supernet.safetensors", space, supernet, {"made": both, "norms": settings.norms})
    (folder / "elastic.part").unlink(missing_ok=True)
    return supernet


def heaviest_network(space: Space, seed: int = 0) -> MobileNet:
    """The network of `space.largest()` with random weights, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return mobilenet(space.architecture(space.largest()), space.classes, space.input_shape[0]).eval()


def _heaviest(
    space: Space, data: Data, settings: OneShot, made: Mapping[str, Json], folder: Path, log: Log | None
) -> MobileNet:
    """The trained heaviest network, its channels ranked; from its file where an earlier call wrote it."""
    file, part, recipe = folder / HEAVIEST_FILE, folder / "heaviest.part", settings.heaviest
    net = heaviest_network(space, seed=recipe.seed)
    done = _finished(file, space, made)
    if done is not None:
        net.load_state_dict(done.tensors)
        return net
    trained = finetune(net, data, recipe=recipe, checkpoint=part, log=_named(log, "heaviest"))
    net.load_state_dict(trained.state_dict())
    # Several processes must agree to the last bit, and sums on a GPU do not.
    alone = recipe.devices * recipe.nodes == 1 and recipe.accelerator != "cpu" and torch.cuda.is_available()
    some = data.batches("train", RANKING_BATCH, limit=math.ceil(settings.ranking * data.size("train")))
    net = reorder(net, importance(net.to("cuda" if alone else "cpu"), some)).cpu()
    _save(file, space, net, {"made": made})
    part.unlink(missing_ok=True)
    return net


def watched(space: Space) -> tuple[str, ...]:
    """The modules whose maps are drawn to the teacher's: stem and stages, by their names in both."""
    return ("act1", *(f"blocks.{s + 1}" for s in range(len(space.stages))))


def save(supernet: Supernet, path: Path) -> None:
    """Write a supernet for `load`. Raises InputError where the place cannot be written."""
    _save(path, supernet.space, supernet, {"norms": supernet.norms})


def load(path: Path, space: Space) -> Supernet:
    """A saved supernet, in evaluation mode. Raises InputError where there is none, BundleError for a damaged
    file and for one of another space.
    """
    found = disk.load(path, {"space": space.sha256()}, ANEW)
    if found is None or "norms" not in found.progress:
        raise InputError("no supernet", where=str(path), fix="train it first")
    return _restored(found, space)


def load_heaviest(path: Path, space: Space) -> MobileNet:
    """The largest network as it was trained alone, in evaluation mode. Raises as `load` does."""
    found = disk.load(path, {"space": space.sha256()}, ANEW)
    if found is None:
        raise InputError("no trained largest network", where=str(path), fix="train it first")
    net = heaviest_network(space)
    net.load_state_dict(found.tensors)
    return net


def _restored(found: disk.Checkpoint, space: Space) -> Supernet:
    supernet = Supernet(space, found.progress["norms"]).eval()
    supernet.load_state_dict(found.tensors)
    return supernet


def _save(path: Path, space: Space, model: nn.Module, facts: Mapping[str, Json]) -> None:
    disk.save(path, {"space": space.sha256()}, disk.Checkpoint(model.state_dict(), facts))


def _finished(path: Path, space: Space, made: Mapping[str, Json]) -> disk.Checkpoint | None:
    """What an earlier call with the same arguments wrote. Raises BundleError for the work of another one."""
    found = disk.load(path, {"space": space.sha256()}, ANEW)
    if found is None:
        return None
    before, now = found.progress.get("made", {}), json.loads(json.dumps(made))
    if "elastic" in before:  # written by an earlier version, which had no such share
        before = {"largest": 0.0, **before}
    apart = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if apart:
        raise BundleError(
            "the folder holds another run",
            where=str(path),
            got=", ".join(f"{key} {before.get(key)}" for key in apart),
            allowed=", ".join(f"{key} {now.get(key)}" for key in apart),
            fix="another folder, or delete this one to start anew",
        )
    return found


def _named(log: Log | None, phase: str) -> Log | None:
    return None if log is None else lambda record: log({"phase": phase, **record})
