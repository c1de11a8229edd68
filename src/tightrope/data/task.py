"""A smaller task cut out of a data set: which classes it tells apart, relabelled, and how it is sampled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch

from tightrope.data.arrays import Arrays
from tightrope.data.base import SPLITS, Data, Indices, Split
from tightrope.data.folder import Folder
from tightrope.errors import BundleError, InputError, near
from tightrope.forms import mismatch, parse

REST = "rest"
LEAST: Mapping[Split, int] = {"train": 10, "validation": 1, "test": 1}  # images of every label
TASK_FORM: dict[str, Any] = {
    "names": [str], "groups": [[int]], "balanced": bool, "seed": int, "new?": (str, NoneType),
    "sample_sha256?": str,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Task:
    """Label k is any of the donor's classes `groups[k]`, called `names[k]`; other classes are left out.

    `balanced`: as many images of the second label as of the first, the same number of every class behind it
    as nearly as there are, drawn by `seed`. `new`: the images are those of another data set with classes
    `names` of its own, and `groups` is empty.
    """

    names: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...] = ()
    balanced: bool = False
    seed: int = 0
    new: str | None = None

    @property
    def singles(self) -> bool:
        """Whether every label is one class of the donor."""
        return bool(self.groups) and all(len(group) == 1 for group in self.groups)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any], where: str) -> Task:
        """Raises BundleError for another form."""
        if wrong := mismatch(body, TASK_FORM):
            raise BundleError("the bundle's task is damaged", where=where, got=wrong)
        return cls(
            names=tuple(body["names"]),
            groups=tuple(tuple(group) for group in body["groups"]),
            balanced=body["balanced"],
            seed=body["seed"],
            new=body.get("new"),
        )


def parse_task(
    classes: Sequence[str], *, chosen: str | None = None, superclasses: Path | None = None, seed: int = 0
) -> Task:
    """The task that a user names: `chosen` is one class (by name or number) against the rest, or several
    classes separated by commas. With `superclasses`, a JSON file {name: [classes]}, the labels are the
    superclasses in the file's order, or with `chosen`, one superclass, the classes inside it.

    Raises InputError for no class, an unknown one, one named twice, or too few to tell apart.
    """
    if superclasses is not None:
        return _superclass_task(classes, superclasses, chosen, seed)
    words = [word.strip() for word in (chosen or "").split(",") if word.strip()]
    if not words:
        raise InputError(
            "no class is named", got=repr(chosen), allowed=_range(classes), fix="--classes 2,5,7"
        )
    numbers = [_class(word, classes) for word in words]
    _once(numbers, words)
    if len(numbers) > 1:
        return Task(names=tuple(classes[k] for k in numbers), groups=tuple((k,) for k in numbers), seed=seed)
    rest = tuple(k for k in range(len(classes)) if k != numbers[0])
    if not rest:
        raise InputError("one class has no rest to be told from", got=chosen, allowed=_range(classes))
    return Task(names=(classes[numbers[0]], REST), groups=((numbers[0],), rest), balanced=True, seed=seed)


def _superclass_task(classes: Sequence[str], path: Path, chosen: str | None, seed: int) -> Task:
    try:
        body = parse(path.read_bytes())
    except FileNotFoundError:
        raise InputError("no such file of superclasses", where=str(path)) from None
    except (OSError, ValueError) as error:
        raise InputError("the file of superclasses is not JSON", where=str(path), got=str(error)) from error
    if not isinstance(body, dict) or not all(isinstance(v, list) and v for v in body.values()):
        raise InputError(
            "superclasses are lists of classes", where=str(path), allowed='{"tops": ["shirt", 2], …}'
        )
    groups = {name: tuple(_class(str(word), classes) for word in words) for name, words in body.items()}
    members = [k for group in groups.values() for k in group]
    _once(members, [classes[k] for k in members])
    if chosen is None:
        if len(groups) < 2:
            raise InputError("at least two superclasses are needed", where=str(path), got=len(groups))
        return Task(names=tuple(groups), groups=tuple(groups.values()), seed=seed)
    if chosen not in groups:
        raise InputError("unknown superclass", where=str(path), got=chosen, allowed=near(chosen, groups))
    if len(groups[chosen]) < 2:
        raise InputError("a superclass of one class leaves nothing to tell apart", got=chosen)
    inside = groups[chosen]
    return Task(names=tuple(classes[k] for k in inside), groups=tuple((k,) for k in inside), seed=seed)


def _class(word: str, classes: Sequence[str]) -> int:
    if word in classes:
        return list(classes).index(word)
    if word.isdecimal() and int(word) < len(classes):
        return int(word)
    raise InputError("no such class", got=word, allowed=_range(classes), fix=f"near: {near(word, classes)}")


def _range(classes: Sequence[str]) -> str:
    return f"0 to {len(classes) - 1}, or a name: {', '.join(list(classes)[:12])}"


def _once(numbers: Sequence[int], words: Sequence[str]) -> None:
    twice = [word for k, word in enumerate(words) if numbers[k] in numbers[:k]]
    if twice:
        raise InputError("a class is named twice", got=", ".join(twice))


def view(data: Data, task: Task, new: Data | None = None) -> Data:
    """The images of `task`, relabelled 0, 1, …; every part from the same part of `data`, in its order.

    With `task.new`, the images of `new` in the scale that the donor of `data` knows.
    Raises InputError for a label with too few images in a part, or images of another shape.
    """
    if task.new is not None:
        assert isinstance(new, Arrays | Folder)
        if new.input_shape != data.input_shape:
            raise InputError(
                "the new images have another shape than those the network knows",
                where=new.name,
                got=new.input_shape,
                allowed=data.input_shape,
            )
        return replace(new, mean=data.mean, std=data.std)
    assert isinstance(data, Arrays | Folder)
    parts = {split: _sample(data, task, split) for split in SPLITS}
    name = f"{data.name}[{'|'.join(task.names)}]"
    if isinstance(data, Arrays):
        arrays = {
            split: (data.splits[split][0][torch.from_numpy(at)], torch.from_numpy(labels))
            for split, (at, labels) in parts.items()
        }
        return replace(data, name=name, classes=task.names, splits=arrays)
    listings = {
        split: (tuple(data.splits[split][0][int(k)] for k in at), labels)
        for split, (at, labels) in parts.items()
    }
    return replace(data, name=name, classes=task.names, splits=listings)


def sample_sha256(data: Data, task: Task) -> str:
    """Which images the task takes, and how it calls them: the same view again, or another data set."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for array in _sample(data, task, split) if task.groups else (_labels(data, split),):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _labels(data: Data, split: Split) -> Indices:
    assert isinstance(data, Arrays | Folder)
    return np.asarray(data.splits[split][1], dtype=np.int64)


def _sample(data: Data, task: Task, split: Split) -> tuple[Indices, Indices]:
    """(positions in the split, new labels) of the images that belong to the task, in the split's order."""
    old = _labels(data, split)
    label_of = np.full(len(data.classes), -1, dtype=np.int64)
    for label, group in enumerate(task.groups):
        label_of[list(group)] = label
    new = label_of[old]
    counts = np.bincount(new[new >= 0], minlength=len(task.groups))
    few = int(counts.argmin())
    if counts[few] < LEAST[split]:
        raise InputError(
            "a class with too few images",
            where=f"{split} part of {data.name}, label {task.names[few]!r}",
            got=int(counts[few]),
            allowed=f"{LEAST[split]} or more",
        )
    if task.balanced:
        generator = np.random.default_rng((task.seed, SPLITS.index(split)))
        wanted = int(counts.min())
        for group in task.groups:
            _thin(old, new, group, wanted, generator)
    at = np.flatnonzero(new >= 0).astype(np.int64)
    return at, new[at]


def _thin(
    old: Indices, new: Indices, group: tuple[int, ...], wanted: int, generator: np.random.Generator
) -> None:
    """Drop images of `group` at random until `wanted` are left, the same number of every class of it."""
    counts = np.array([(old == k).sum() for k in group])
    take = np.zeros(len(group), dtype=np.int64)
    while take.sum() < wanted:  # classes that run out leave their share to the others
        open_ = np.flatnonzero(take < counts)
        each, extra = divmod(wanted - int(take.sum()), len(open_))
        more = np.full(len(open_), each)
        more[generator.permutation(len(open_))[:extra]] += 1
        take[open_] = np.minimum(take[open_] + more, counts[open_])
    for k, keep in zip(group, take, strict=True):
        at = np.flatnonzero(old == k)
        new[generator.permutation(at)[keep:]] = -1
