"""Tasks cut out of data sets: relabelling, balanced sampling, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tightrope.data import Arrays, Task, load, parse_task, sample_sha256, view
from tightrope.errors import BundleError, InputError

CLASSES = tuple("abcdef")


def arrays(labels: list[int], name: str = "toy") -> Arrays:
    """Pixel (0, 0) of image k is its number in the part, pixel (0, 1) its label."""
    y = torch.tensor(labels)
    x = torch.zeros(len(y), 1, 2, 2, dtype=torch.uint8)
    x[:, 0, 0, 0], x[:, 0, 0, 1] = torch.arange(len(y)) % 256, y
    return Arrays(name, CLASSES, (0.0,), (1 / 255,), dict.fromkeys(("train", "validation", "test"), (x, y)))


SOME = arrays([0] * 40 + [1] * 13 + [2] * 60 + [3] * 60 + [4] * 5 + [5] * 60)


def test_one_class_against_the_rest_is_balanced_and_stratified():
    task = parse_task(CLASSES, chosen="b")
    assert (task.names, task.groups) == (("b", "rest"), ((1,), (0, 2, 3, 4, 5)))
    ((x, y),) = view(SOME, task).batches("train", 1000)
    assert (y == 0).sum() == (y == 1).sum() == 13
    old = x[:, 0, 0, 1].long()
    assert set(old[y == 0].tolist()) == {1}
    counts = old[y == 1].bincount(minlength=6)
    assert counts[1] == 0 and sorted(counts[[0, 2, 3, 4, 5]].tolist()) == [2, 2, 3, 3, 3]


def test_a_small_class_of_the_rest_leaves_its_share_to_the_others():
    ((x, y),) = view(SOME, parse_task(CLASSES, chosen="0")).batches("test", 1000)
    counts = x[:, 0, 0, 1].long()[y == 1].bincount(minlength=6)
    assert counts.sum() == 40 and counts[4] == 5
    assert counts[[1, 2, 3, 5]].max() - counts[[1, 2, 3, 5]].min() <= 1


def test_a_subset_is_relabelled_in_the_order_named_and_keeps_the_order_of_the_images():
    ((x, y),) = view(SOME, parse_task(CLASSES, chosen="5, b ,2")).batches("validation", 1000)
    assert x[:, 0, 0, 1].tolist() == [1] * 13 + [2] * 60 + [5] * 60
    assert y.tolist() == [1] * 13 + [2] * 60 + [0] * 60


def test_superclasses_are_labels_or_tasks(tmp_path):
    path = tmp_path / "groups.json"
    path.write_text(json.dumps({"late": ["f", 3], "early": ["a", "b"]}))
    task = parse_task(CLASSES, superclasses=path)
    assert (task.names, task.groups) == (("late", "early"), ((5, 3), (0, 1)))
    assert not task.singles
    inside = parse_task(CLASSES, superclasses=path, chosen="late")
    assert (inside.names, inside.groups) == (("f", "d"), ((5,), (3,)))


@given(st.lists(st.integers(0, 5), min_size=150, max_size=400), st.integers(0, 5), st.integers(0, 3))
def test_sampling_is_a_function_of_the_seed_and_balanced(labels, chosen, seed):
    data = arrays([k % 6 for k in range(72)] + labels)
    task = parse_task(CLASSES, chosen=str(chosen), seed=seed)
    a, b = view(data, task), view(data, task)
    assert torch.equal(a.splits["train"][0], b.splits["train"][0])
    y = a.splits["train"][1]
    assert (y == 0).sum() == (y == 1).sum() > 0
    assert sample_sha256(data, task) == sample_sha256(data, task)


def test_the_hash_tells_another_seed_or_other_images():
    task = parse_task(CLASSES, chosen="b")
    other = arrays([*SOME.splits["train"][1].tolist()[1:], 0])
    found = {
        sample_sha256(SOME, task),
        sample_sha256(SOME, parse_task(CLASSES, chosen="b", seed=1)),
        sample_sha256(other, task),
    }
    assert len(found) == 3


def test_the_order_of_labels_does_not_depend_on_the_file_system(tmp_path, monkeypatch):
    for name in CLASSES:
        (tmp_path / name).mkdir()
        for k in range(15):
            Image.new("RGB", (4, 4), (ord(name), k, 0)).save(tmp_path / name / f"{k}.png")
    straight = load(str(tmp_path), image_size=4)
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(sorted(listed(self), reverse=True)))
    turned = load(str(tmp_path), image_size=4)
    assert straight.classes == turned.classes == CLASSES
    task = parse_task(straight.classes, chosen="c,a")
    a, b = view(straight, task), view(turned, task)
    assert a.splits["train"][0] == b.splits["train"][0]
    assert np.array_equal(a.splits["train"][1], b.splits["train"][1])
    assert {p.parent.name for p in a.splits["test"][0]} == {"a", "c"}
    assert sample_sha256(straight, task) == sample_sha256(turned, task)


def test_new_images_come_in_the_scale_that_the_donor_knows():
    new = arrays([0] * 20 + [1] * 20, "new")
    new = replace(new, mean=(0.3,), std=(0.7,), classes=("x", "y"))
    found = view(SOME, Task(names=("x", "y"), new="new"), new)
    assert (found.mean, found.std, found.classes) == (SOME.mean, SOME.std, ("x", "y"))
    wide = replace(new, splits={k: (torch.cat([x, x], 1), y) for k, (x, y) in new.splits.items()})
    with pytest.raises(InputError, match="another shape"):
        view(SOME, Task(names=("x", "y"), new="new"), wide)


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        (None, "no class is named"),
        (" , ", "no class is named"),
        ("6", "no such class"),
        ("-1", "no such class"),
        ("bb", "no such class"),
        ("1,b", "named twice"),
    ],
)
def test_bad_classes_are_refused(chosen, says):
    with pytest.raises(InputError, match=says):
        parse_task(CLASSES, chosen=chosen)


def test_a_class_with_too_few_images_is_refused():
    with pytest.raises(InputError, match=r"too few images(.|\n)*'e'(.|\n)*5(.|\n)*10 or more"):
        view(SOME, parse_task(CLASSES, chosen="a,e"))


@pytest.mark.parametrize(
    ("text", "chosen", "says"),
    [
        ("{", None, "not JSON"),
        ("[]", None, "lists of classes"),
        ('{"x": []}', None, "lists of classes"),
        ('{"x": ["a"]}', None, "at least two"),
        ('{"x": ["a"], "y": ["a"]}', None, "named twice"),
        ('{"x": ["a"], "y": ["z"]}', None, "no such class"),
        ('{"x": ["a"], "y": ["b"]}', "z", "unknown superclass"),
        ('{"x": ["a"], "y": ["b"]}', "x", "nothing to tell apart"),
    ],
)
def test_bad_files_of_superclasses_are_refused(tmp_path, text, chosen, says):
    (tmp_path / "groups.json").write_text(text)
    with pytest.raises(InputError, match=says):
        parse_task(CLASSES, superclasses=tmp_path / "groups.json", chosen=chosen)
    with pytest.raises(InputError, match="no such file"):
        parse_task(CLASSES, superclasses=tmp_path / "none.json")


def test_a_task_survives_json():
    task = parse_task(CLASSES, chosen="b", seed=3)
    assert Task.from_json(json.loads(json.dumps(task.to_json())), "here") == task
    with pytest.raises(BundleError, match="task is damaged"):
        Task.from_json({"names": "b"}, "here")
