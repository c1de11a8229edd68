"""Between the pipeline and a method that learns: the task that is wanted, and the plan that comes out."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from tightrope import data as datasets
from tightrope.bundle import LEARNING, Bundle
from tightrope.data import Data, Task
from tightrope.donor import Donor, warn_of_chance
from tightrope.errors import InputError
from tightrope.graph import Graph
from tightrope.methods import Learned, Learner, Method, Progress
from tightrope.place import model_sha256
from tightrope.rewrite import method_of
from tightrope.shard import Shard
from tightrope.types import Budget, Json, Link, Plan
from tightrope.unfinished import going_on


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A task of its own: `classes` and `superclasses` as in `data.parse_task`, or the images of `new_data`.
    Nothing of these: the network's own task.
    """

    classes: str | None = None
    superclasses: Path | None = None
    new_data: str | None = None

    @property
    def anything(self) -> bool:
        return self != EVERYTHING

    def refuse(self, method: str) -> None:
        """Raise InputError if there is a task, for a method that makes networks for none."""
        if self.anything:
            raise InputError(
                f"{method} changes a network for the task that it has, not for another one",
                got="--classes, --superclasses or --new-data",
                fix="--method reengineer",
            )


EVERYTHING = Wanted()
SAME = ("data", "root", "image_size", "runtime", "pricing")  # in `about`, of a bundle that is not made again
EACH = Wanted(classes="each")  # of the command line: `learn_each`


@dataclass(frozen=True)
class Asked:
    """Images to learn from, with labels of `task`; without one they are the network's own."""

    data: Data
    task: Task | None
    sample_sha256: str

    def to_json(self) -> dict[str, Json] | None:
        return None if self.task is None else self.task.to_json() | {"sample_sha256": self.sample_sha256}


def ask(images: Data, wanted: Wanted, image_size: int | None, seed: int) -> Asked:
    """Raises InputError for a task that cannot be."""
    if wanted.new_data is not None:
        if wanted.classes is not None or wanted.superclasses is not None:
            raise InputError("new images have classes of their own", got="--new-data with --classes")
        new = datasets.load(wanted.new_data, image_size=image_size)
        task = Task(names=new.classes, seed=seed, new=datasets.located(wanted.new_data))
        return Asked(datasets.view(images, task, new), task, datasets.sample_sha256(new, task))
    if not wanted.anything:
        return Asked(images, None, "")
    task = datasets.parse_task(
        images.classes, chosen=wanted.classes, superclasses=wanted.superclasses, seed=seed
    )
    return Asked(datasets.view(images, task), task, datasets.sample_sha256(images, task))


def learn(
    donor: Donor,
    wanted: Wanted,
    budget: Budget,
    out: Path,
    *,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress,
    warn: Callable[[str], object],
    shard: Shard,
) -> Bundle:
    """One task: train within the budget, write a bundle. `warn` hears of a network no better than chance.

    An interrupted call is gone on with, if it is the same, or forgotten (`restart`); see `unfinished`.
    """
    method = donor.method
    assert isinstance(method, Learner)
    asked = ask(donor.images, wanted, donor.about["image_size"], _seed(donor))
    workdir, run = out / LEARNING, _run(donor, asked, budget)
    with going_on(workdir, run, progress, restart=restart, shard=shard) as told:
        learned = method.learn(
            donor.graph,
            asked.data,
            task=asked.task,
            budget=budget,
            cost=donor.cost,
            workdir=workdir,
            progress=told,
            shard=shard,
        )
    if shard.first:
        about = {**donor.about, "task": asked.to_json()}
        bundle = Bundle.create(out, about, donor.net, overwrite=overwrite)
        keep(bundle, method, learned, asked, budget, donor.about["model"], donor.graph, donor.chain)
        net = method.rebuild(donor.graph, learned.choices, learned.tensors)
        what = f"what was learned ({out})"
        warn_of_chance(what, net, asked.data, warn, "More epochs or images, or a larger budget")
    shard.barrier()
    return Bundle(out)


def _run(donor: Donor, asked: Asked, budget: Budget) -> dict[str, Json]:
    """Which search it is, in words of the command line."""
    about = donor.about
    prices = hashlib.sha256(json.dumps(about["pricing"], sort_keys=True).encode()).hexdigest()
    return {
        "method": donor.method.name,
        "set": asdict(donor.method),  # type: ignore[call-overload]
        "budget": str(budget),
        "model": {"name": about["model"], "weights": model_sha256(donor.graph.module)},
        "data": about["data"],
        "task": asked.to_json(),
        "runtime": {"name": about["runtime"], "prices": prices},
    }


def learn_each(
    donor: Donor,
    budget: Budget,
    out: Path,
    *,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress,
    warn: Callable[[str], object],
    shard: Shard,
) -> list[Bundle]:
    """Every class against the rest: a bundle each, `out`/NUMBER-NAME. Processes take classes in turn.

    Interrupted, the same call goes on: a bundle of the same network, method, budget, images and prices is not
    made again.
    Raises InputError for a method that does not make networks for tasks, before anything is trained.
    """
    if not isinstance(donor.method, Learner):
        EACH.refuse(donor.method.name)
    names = donor.images.classes
    paths = [
        out / f"{k}-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}" for k, name in enumerate(names)
    ]
    sha256 = model_sha256(donor.graph.module)
    waiting = [k for k, path in enumerate(paths) if overwrite or not _made(path, k, donor, budget, sha256)]
    for k in waiting:
        Bundle.check_target(paths[k], overwrite=overwrite)
    own = waiting[shard.rank :: shard.world]
    for done, k in enumerate(own):
        one = Wanted(classes=str(k))
        learn(
            donor, one, budget, paths[k],
            overwrite=overwrite, restart=restart, progress=lambda *_: None, warn=warn,
            shard=Shard(device=shard.device),
        )  # fmt: skip
        progress("tasks", done + 1, len(own))
    shard.barrier()
    return [Bundle(path) for path in paths]


def _made(path: Path, k: int, donor: Donor, budget: Budget, sha256: str) -> bool:
    """Whether the bundle of class `k` is there, made by the same call."""
    if not (path / "plan.json").is_file():
        return False
    bundle = Bundle(path)
    asked = ask(donor.images, Wanted(classes=str(k)), donor.about["image_size"], _seed(donor))
    about = {key: donor.about[key] for key in SAME} | {"task": asked.to_json()}
    return bundle.plan().base_sha256 == sha256 and made_by(bundle, donor.method, budget, about)


def made_by(bundle: Bundle, method: Method | Learner, budget: Budget, about: Mapping[str, Json]) -> bool:
    """Whether a bundle with a plan is of this method and budget, and of the images and prices of `about`."""
    plan, there = bundle.plan(), bundle.about
    if (plan.budget, method_of(plan)) != (str(budget), method):
        return False
    return all(there.get(key) == value for key, value in json.loads(json.dumps(dict(about))).items())


def _seed(donor: Donor) -> int:
    return int(getattr(donor.method, "seed", 0))


def keep(
    bundle: Bundle,
    method: Learner,
    learned: Learned,
    asked: Asked,
    budget: Budget,
    base: str,
    graph: Graph,
    chain: tuple[Link, ...] = (),
) -> None:
    """Write what was learned. Nothing is proved of it: the bound is 0."""
    plan = Plan(
        method=method.name,
        config=asdict(method),  # type: ignore[call-overload]
        budget=str(budget),
        choices=learned.choices,
        predicted=learned.predicted,
        baseline=learned.baseline,
        loss=learned.loss,
        bound=0.0,
        base=base,
        base_sha256=model_sha256(graph.module),
        input_shape=graph.input_shape,
        notes=learned.notes,
        chain=chain,
    )
    record = {
        "accuracy": learned.accuracy,
        "controls": dict(learned.controls),
        "front": [dict(point) for point in learned.front],
        "classes": list(asked.data.classes),
        "shown": [asdict(table) for table in learned.shown],
    }
    bundle.save_learned(learned.tensors, plan.base_sha256, record)
    bundle.save_plan(plan)
    shutil.rmtree(bundle.path / LEARNING, ignore_errors=True)
