"""Between the pipeline and a method that learns: the task that is wanted, and the plan that comes out."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from tightrope import data as datasets
from tightrope.bundle import LEARNING, Bundle
from tightrope.data import Data, Task
from tightrope.errors import InputError
from tightrope.graph import Graph
from tightrope.methods import Learned, Learner
from tightrope.place import model_sha256
from tightrope.types import Budget, Json, Plan


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


def keep(
    bundle: Bundle, method: Learner, learned: Learned, asked: Asked, budget: Budget, base: str, graph: Graph
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
