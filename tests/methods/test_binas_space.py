"""The search space: its size, its choices, its counts, and a user's own from TOML."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from published import BINAS, COUNTS
from tightrope.errors import InputError
from tightrope.lower import lower
from tightrope.methods.binas.counts import counts
from tightrope.methods.binas.space import PRESETS, Space, resolve
from tightrope.models.arch import Architecture
from tightrope.models.mobilenet import mobilenet
from tightrope.program import base_cost

TOML = """
input_shape = [1, 12, 12]
classes = 4
stem = 8
stride = 1
first = 8
last = 24
head = 32
expansions = [1, 2.5]
kernels = [3]
stages = [{channels = 8, stride = 1, depths = [1, 3]}, {channels = 12, stride = 2, depths = [2], act = "sw"}]
"""


def a_choice(space: Space, seed: int):
    return space.random(np.random.default_rng(seed))


def test_the_published_space_has_its_published_size():
    space = PRESETS["imagenet"]
    assert space.count == (12**2 + 12**3 + 12**4) ** 5
    assert str(space.options[0]) == "e3 k3"
    assert str(space.options[11]) == "e6 k5 se0.25"
    keys = {(w, side, s, b == 0) for s, b, w, side in space.places()}
    assert len(keys) * len(space.options) == 120  # distinct blocks of the published table


@pytest.mark.parametrize("name", BINAS)
def test_published_networks_are_choices_of_the_published_space(name):
    space = PRESETS["imagenet"]
    choice = space.choice(Architecture.parse(BINAS[name]))
    assert str(space.architecture(choice)) == BINAS[name]
    if name in COUNTS:
        found = counts(space, choice)
        assert (round(found["weights"] / 1e6, 2), round(found["macs"] / 1e6)) == COUNTS[name]


def test_the_extremes_count_what_was_published():
    space = PRESETS["imagenet"]
    small, large = counts(space, space.smallest()), counts(space, space.largest())
    assert (round(small["weights"] / 1e6, 2), round(small["macs"] / 1e6)) == (3.25, 137)
    assert (round(large["weights"] / 1e6, 2), round(large["macs"] / 1e6)) == (8.95, 521)


@settings(max_examples=12)
@given(st.sampled_from(sorted(PRESETS)), st.integers(0, 2**32 - 1))
def test_counts_are_those_of_the_module_and_of_its_program(name, seed):
    space = PRESETS[name]
    choice = a_choice(space, seed)
    net = mobilenet(space.architecture(choice), space.classes, space.input_shape[0]).eval()
    macs = sum(base_cost(op).macs for op in lower(net, space.input_shape).ops)
    weights = sum(p.numel() for p in net.parameters())
    assert counts(space, choice) == {"macs": macs, "weights": weights}


@given(st.sampled_from(sorted(PRESETS)), st.integers(0, 2**32 - 1))
def test_choices_go_through_strings(name, seed):
    space = PRESETS[name]
    choice = a_choice(space, seed)
    assert space.choice(Architecture.parse(str(space.architecture(choice)))) == choice


def test_random_choices_have_every_depth_and_option():
    space = PRESETS["fashion"]
    seen = [a_choice(space, seed) for seed in range(200)]
    assert {len(stage) for choice in seen for stage in choice} == {1, 2, 3}
    assert {k for choice in seen for stage in choice for k in stage} == set(range(12))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: replace(a, stem=16), "stem"),
        (lambda a: replace(a, stages=a.stages[:-2] + a.stages[-1:]), "number of stages"),
        (lambda a: replace(a, stages=(a.stages[0], a.stages[1][:1], *a.stages[2:])), "no such depth"),
        (lambda a: Architecture.parse(str(a).replace("k5_s2_e3_c24", "k5_s2_e5_c24")), "stage 1, block 1"),
        (lambda a: Architecture.parse(str(a).replace("c24", "c16")), "c16"),
        (lambda a: Architecture.parse(str(a).replace("c960", "c480")), "c480"),
    ],
)
def test_foreign_networks_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        PRESETS["imagenet"].choice(change(Architecture.parse(BINAS["A"])))


def test_activations_that_are_the_default_may_be_written():
    text = BINAS["A"].replace("c80'", "c80_nhs'")
    space = PRESETS["imagenet"]
    assert space.choice(Architecture.parse(text)) == space.choice(Architecture.parse(BINAS["A"]))


def test_a_users_own_space(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(TOML)
    space = resolve(str(path))
    assert (space.name, len(space.options), space.count) == ("mine", 4, (4 + 64) * 16)
    arch = space.architecture(space.largest())
    assert mobilenet(arch, space.classes, 1)
    assert space.choice(Architecture.parse(str(arch))) == space.largest()
    assert space.sha256() == replace(space, name="else").sha256()
    assert space.sha256() != replace(space, head=8).sha256()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("stem = 8", "", "lacks stem"),
        ("stem = 8", "stem = 8\nstemm = 8", "unknown: stemm"),
        ("stem = 8", "stem = 'x'", "whole number"),
        ("stem = 8", "stem = ", "cannot read"),
        ("stride = 1\n", "stride = 3\n", "stride"),
        ("kernels = [3]", "kernels = [4]", "odd"),
        ("kernels = [3]", "kernels = []", "options"),
        ("[1, 2.5]", "[2, 2]", "options"),
        ("[1, 2.5]", "[2.12345678]", "decimals|number"),
        ("depths = [2]", "depths = [2, 1]", "rise"),
        ("depths = [2]", "depths = [0]", "rise"),
        ("act = \"sw\"", "act = \"xx\"", "activation"),
        ("act = \"sw\"", "acct = \"sw\"", "unknown key"),
        ("[1, 12, 12]", "[1, 12, 13]", "square"),
        ("[1, 12, 12]", "[12, 12]", "height"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_explained(tmp_path, old, new, words):
    path = tmp_path / "mine.toml"
    assert old in TOML
    path.write_text(TOML.replace(old, new))
    with pytest.raises(InputError, match=words):
        resolve(str(path))


def test_unknown_spaces_are_refused(tmp_path):
    with pytest.raises(InputError, match="imagenet"):
        resolve("imagnet")
    with pytest.raises(InputError, match="no such file"):
        resolve(str(tmp_path / "none.toml"))


def test_the_number_of_networks_is_exact():
    assert math.log10(PRESETS["imagenet"].count) == pytest.approx(21.77, abs=0.01)
