"""Counts of the published spaces and ReLU maps, and what is no space or map."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from methods.seesaw.published import COUNTS, LONG, MAPS, SHORT, entries
from tightrope.errors import BundleError, InputError
from tightrope.lower import lower
from tightrope.methods.seesaw import SeesawMethod, relu_map
from tightrope.methods.seesaw.network import assemble
from tightrope.methods.seesaw.operators import ALL, LOW_MEMORY, parse_operators
from tightrope.methods.seesaw.space import PRESETS, Architecture, Space, resolve
from tightrope.program import base_cost


def test_the_lists_of_operators_have_their_published_lengths():
    assert (len(ALL), len(LOW_MEMORY)) == (27, 10)
    assert set(LOW_MEMORY) < set(ALL)
    assert PRESETS.keys() == COUNTS.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_published_spaces_count_what_they_should(name):
    space = PRESETS[name]
    assert (space.blocks, sum(space.blocks), space.floor, space.maximum) == COUNTS[name]
    assert space.relus([False] * sum(space.blocks)) == space.floor


@pytest.mark.parametrize(("name", "enabled", "total"), MAPS)
def test_published_maps_have_their_published_totals(name, enabled, total, tmp_path):
    space = PRESETS[name]
    on = relu_map.from_json(entries(sum(space.blocks), enabled), space)
    assert space.relus(on) == total
    relu_map.write(tmp_path / "map.json", on)
    assert relu_map.read(tmp_path / "map.json", space) == on
    assert json.loads((tmp_path / "map.json").read_text()) == entries(sum(space.blocks), enabled)


def test_the_row_with_too_many_keys_is_refused():
    """16 keys for a network of 8 blocks: it is a map of cifarsupermodel50, or means the last two blocks."""
    keys, enabled, total = LONG
    with pytest.raises(InputError, match=r"another network(.|\n)*16 entries(.|\n)*default_8"):
        relu_map.from_json(entries(keys, enabled), PRESETS["cifarsupermodel16"])
    other = PRESETS["cifarsupermodel50"]
    assert other.relus(relu_map.from_json(entries(keys, enabled), other)) == total
    assert PRESETS["cifarsupermodel16"].relus([k in (7, 8) for k in range(1, 9)]) == total


def test_the_row_without_aggregates_counts_more_than_published():
    """The published total is that of the blocks alone."""
    keys, enabled, total = SHORT
    space = PRESETS["cifarsupermodel101"]
    found = space.relus(relu_map.from_json(entries(keys, enabled), space))
    assert (found, found - space.floor) == (176_128, total)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ([], "not a ReLU map"),
        ({"default_1": 2}, r"not an entry(.|\n)*got: +default_1: 2\n  allowed:.*0 or 1"),
        ({"default_1": True}, r"not an entry(.|\n)*got: +default_1: true\n  allowed:.*0 or 1"),
        ({"Default_1": 1}, "not an entry"),
        ({"default_0": 1}, "not an entry"),
        (entries(7, ()), r"7 entries up to default_7"),
        (entries(8, ()) | {"default_9": 0}, r"9 entries up to default_9"),
    ],
)
def test_what_is_no_map_is_refused(body, says, tmp_path):
    path = tmp_path / "map.json"
    path.write_text(json.dumps(body))
    with pytest.raises(InputError, match=says):
        relu_map.read(path, PRESETS["cifarsupermodel16"])


def test_a_map_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "map.json").write_text("{")
    (tmp_path / "twice.json").write_text('{"default_1": 1, "default_2": 0, "default_2": 1}')
    (tmp_path / "weights.bin").write_bytes(b"\x80\x02\xff" * 20)
    said = {
        "map.json": "is no JSON(.|\n)*Expecting", "nothing.json": "No such file",
        "twice.json": "the key default_2 is given twice", "weights.bin": "no text",
    }  # fmt: skip
    for name, says in said.items():
        with pytest.raises(InputError, match=rf"{name}(.|\n)*{says}" if "JSON" not in says else says):
            relu_map.read(tmp_path / name, PRESETS["cifarsupermodel16"])


def test_a_written_map_is_read_as_it_was(tmp_path):
    on = (True, False, False, True, True, False, True, False)
    relu_map.write(tmp_path / "map.json", on)
    assert relu_map.read(tmp_path / "map.json", PRESETS["cifarsupermodel16"]) == on


def test_comparisons_of_max_pools_are_counted():
    """On CIFAR and on ImageNet more than twice the ReLUs of the smallest published network."""
    for name, pools in (("cifarsupermodel50", 86_016), ("supermodel50", 263_424)):
        space = PRESETS[name]
        network = space.network(["conv_3"], relu=False)
        assert space.drelus(network) == space.floor + pools == space.least
        free = replace(space, pools=("max", "avg"), free=True)
        assert free.least == free.drelus(free.network(["conv_3"], relu=False, pool="avg")) == 0


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_the_stride_of_the_stem(stride):
    space = resolve("1,1", (1, 28, 28), 10, stem=4, operators=("conv_3",), stride=stride)
    assert space.shape(0) == (8, 28 // stride, 28 // stride)
    net = assemble(space, space.network(["conv_3"], relu=True))
    assert net.stem(torch.zeros(1, 1, 28, 28)).shape == (1, 4, 28 // stride, 28 // stride)
    assert net.eval()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize(("stride", "says"), [(3, "1, 2, 4"), (0, "positive"), (1.5, "whole number")])
def test_other_strides_are_refused(stride, says):
    with pytest.raises(InputError, match=says):
        SeesawMethod(space="1,1", stem_stride=stride).space_for((1, 36, 36), 10)


def test_spaces_for_other_images():
    grey = resolve("2,2,2", (1, 28, 28), 10, stem=8)
    assert [grey.shape(k) for k in (-1, 0, 1, 2)] == [(8, 28, 28), (16, 28, 28), (32, 14, 14), (64, 7, 7)]
    assert resolve("supermodel50", (3, 224, 224), 1000) == PRESETS["supermodel50"]
    wide = resolve("1,1", (3, 96, 128), 3)
    assert wide.shape(1) == (128, 12, 16)
    one = resolve("3", (1, 28, 28), 10)
    assert (one.blocks, one.floor, one.shape(0)) == ((3,), 0, (64, 28, 28))
    odd = resolve("1,1,1,1", (1, 28, 28), 10)  # the last map may be cut: nothing is added to it
    assert odd.shape(3) == (512, 3, 3)


@pytest.mark.parametrize(
    ("text", "shape", "says"),
    [
        ("cifarsupermodel51", (3, 32, 32), "cifarsupermodel50"),
        ("2,0", (3, 32, 32), "unknown search space(.|\n)*each from 1 to 999"),
        ("2,x", (3, 32, 32), "unknown search space(.|\n)*each from 1 to 999"),
        ("-1", (3, 32, 32), "unknown search space(.|\n)*each from 1 to 999"),
        ("", (3, 32, 32), "unknown search space"),
        ("2,2,2", (3, 27, 27), "divisible by 2"),
        ("1,1,1,1,1", (1, 28, 28), "divisible by 8"),
        ("1,1", (1, 1, 1), "divisible"),
    ],
)
def test_what_is_no_space_is_refused(text, shape, says):
    with pytest.raises(InputError, match=says):
        resolve(text, shape, 10)


def test_a_space_names_what_is_wrong_with_it():
    with pytest.raises(InputError, match="multiple of 8 channels"):
        Space("x", (1, 28, 28), 10, (1,), stem=3)
    with pytest.raises(InputError, match="pools with"):
        Space("x", (1, 28, 28), 10, (1,), pools=("min",))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("conv_9", r"unknown operator(.|\n)*conv_"),
        ("conv_9", "try: +a whole list: --set operators=all or --set operators=low-memory"),
        ("conv_3,skip,conv_3,skip", r"twice\n  got: +conv_3, skip$"),
        ("none", "an operator beside none"),
        ("", "unknown operator"),
    ],
)
def test_operators_that_do_not_exist_are_refused(text, says):
    with pytest.raises(InputError, match=says):
        parse_operators(text)
    assert parse_operators("skip, conv_3") == ("skip", "conv_3")


def test_architectures_come_back_from_json_or_are_refused():
    space = resolve("1,2", (1, 28, 28), 10, stem=4)
    network = space.network(["skip", "conv_3"], relu=True)
    body = json.loads(json.dumps(network.to_json()))
    assert Architecture.from_json(body, space) == network
    for key, value in (
        ("block1", {"operators": ["conv_3", "skip"], "relu": True}),  # another order
        ("block1", {"operators": [], "relu": True}),
        ("block2", {"operators": ["none"], "relu": True}),
        ("block2", {"operators": ["conv_9"], "relu": True}),
        ("block3", {"operators": ["conv_3"], "relu": 1}),
        ("aggregate1", {"pool": "min", "relu": True}),
        ("block4", {"operators": ["conv_3"], "relu": True}),
    ):
        with pytest.raises(BundleError, match="no network of its space"):
            Architecture.from_json(body | {key: value}, space)


@pytest.mark.parametrize("name", ["cifarsupermodel16", "cifarsupermodel50", "supermodel16"])
def test_real_networks_have_the_published_counts(name):
    """Counted from the lowered network: ReLUs as published, and three comparisons a pooled value."""
    space = PRESETS[name]
    network = space.network(["skip"], relu=True)
    program = lower(assemble(space, network), space.input_shape)
    relus = sum(base_cost(op).drelus for op in program.ops if op.kind == "relu")
    assert relus == space.maximum == COUNTS[name][3]
    assert sum(base_cost(op).drelus for op in program.ops) == relus + 3 * space.floor == space.drelus(network)
