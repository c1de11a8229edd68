"""Programs on disk: bit-exact round trips, and a clear refusal of everything else."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from generated import cnns
from networks import NETWORKS, Chain, conv, settle
from tightrope.errors import BundleError, InputError
from tightrope.lower import lower
from tightrope.nn import BlockReLU
from tightrope.program import OPS, Add, Conv2d, MaxPool2d, Op, Program, Relu, base_cost
from tightrope.runtimes.plain import evaluate, ranges

SHAPE = (3, 8, 8)
PATCHES = [(1, 1), (0, 0), (2, 3), (8, 8)]


@pytest.fixture
def program() -> Program:
    model = settle(Chain(conv(3, 4), torch.nn.BatchNorm2d(4), BlockReLU(PATCHES, 6.0), conv(4, 2)))
    return ranges(lower(model, SHAPE), [torch.randn(4, *SHAPE)])


def equal(a: Program, b: Program) -> bool:
    weights = a.tensors.keys() == b.tensors.keys() and all(
        v.dtype == b.tensors[k].dtype and v.tobytes() == b.tensors[k].tobytes() for k, v in a.tensors.items()
    )
    return weights and replace(a, tensors={}) == replace(b, tensors={})


def test_a_program_survives_its_files_bit_by_bit(program, tmp_path):
    program.save(tmp_path)
    again = Program.load(tmp_path)
    assert equal(program, again)
    assert again.sha256() == program.sha256()
    x = torch.randn(2, *SHAPE)
    assert torch.equal(evaluate(program, x), evaluate(again, x))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["program.json", "program.safetensors"]


def test_a_program_of_no_weights_survives_the_pipe_to_its_server(tmp_path):
    program = lower(Chain(torch.nn.ReLU()), SHAPE)
    assert equal(program, Program.decode(program.structure(), program.weights(), tmp_path))
    with pytest.raises(BundleError, match="damaged"):
        Program.decode(program.structure(), b"", tmp_path)


@settings(max_examples=25)
@given(cnns())
def test_random_programs_survive_their_files(tmp_path_factory, generated):
    model, shape = generated
    program = lower(model, shape)
    directory = tmp_path_factory.mktemp("program")
    program.save(directory)
    assert equal(program, Program.load(directory, weights=bool(program.tensors)))


def test_the_public_part_has_no_weights(program, tmp_path):
    public = program.public()
    assert not public.tensors
    assert public.sha256() == program.sha256()
    public.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["program.json"]
    text = (tmp_path / "program.json").read_text()
    assert not any(repr(float(v)) in text for t in program.tensors.values() for v in t.ravel()[:50])
    assert Program.load(tmp_path, weights=False) == public


def test_the_hash_is_of_the_structure_only(program):
    weights = {k: v + 1 for k, v in program.tensors.items()}
    assert replace(program, tensors=weights).sha256() == program.sha256()
    first, relu = program.ops[:2]
    assert isinstance(relu, Relu)
    changed = [
        replace(relu, patches=((1, 1), (0, 0), (2, 2), (8, 8))),
        replace(relu, upper=None),
        replace(relu, name="other"),
    ]
    variants = [replace(program, ops=(first, new), output=new.name) for new in (relu, *changed)]
    variants.append(replace(program, ranges={}))
    hashes = {p.sha256() for p in (program, *variants)}
    assert len(hashes) == 1 + len(variants)
    assert program.sha256() == Program(**vars(program)).sha256()


def rewrite_json(directory, change):
    path = directory / "program.json"
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b["ops"][0].update(kind="conv3d"), "unknown op(.|\n)*conv3d(.|\n)*conv2d"),
        (lambda b: b["ops"][0].update(colour=1), r"unknown keys(.|\n)*parts.0(.|\n)*colour"),
        (lambda b: b["ops"][0].pop("kernel"), "damaged(.|\n)*kernel"),
        (lambda b: b["ops"][0].pop("kind"), "damaged(.|\n)*kind"),
        (lambda b: b.pop("ops"), "damaged"),
        (lambda b: b.update(ops=3), "damaged"),
        (lambda b: b.update(input_shape=None), "damaged"),
        (lambda b: b.update(schema=7), "another version"),
        (lambda b: b.pop("schema"), "another version"),
        (lambda b: b.update(output="nowhere"), "output is not one of its values"),
        (lambda b: b["ops"].reverse(), "not a sequence"),
        (lambda b: b["ops"].append(b["ops"][0]), "not a sequence(.|\n)*twice"),
        (lambda b: b["ops"][1].update(inputs=["ghost"]), r"not a sequence(.|\n)*ghost"),
        (lambda b: b["ops"][0].update(kernel=[1, 1], padding=[0] * 4), "wrong shape: parts.0.weight"),
        (lambda b: b["ops"][0].update(in_channels=6), r"parts.0 \(conv2d\) does not fit(.|\n)*6 channels"),
        (lambda b: b["ops"][0].update(stride=[0, 1]), r"parts.0 \(conv2d\) does not fit(.|\n)*positive"),
        (lambda b: b["ops"][0].update(stride=[2, 2]), r"does not fit(.|\n)*\(4, 4, 4\)(.|\n)*\(4, 8, 8\)"),
        (lambda b: b["ops"][0].update(inputs=["input"] * 2), "parts.0 (.*) does not fit"),
        (lambda b: b["ops"][0].update(inputs=[]), "parts.0 (.*) does not fit"),
        (lambda b: b["ops"][1]["patches"].pop(), r"relu\) does not fit(.|\n)*each of 4 channels, got 3"),
        (lambda b: b["ops"][1].update(upper="x"), r"relu\) does not fit"),
        (lambda b: b.update(input_shape=[3, 8, 9]), "does not fit its inputs"),
        (lambda b: b["ops"][0].update(shape=["4", 8, 8]), r"damaged(.|\n)*ops\[0\].shape\[0\]"),
        (lambda b: b["ranges"].update(input="wide"), "damaged(.|\n)*ranges.input"),
        (lambda b: b["ranges"].update(input=0.5), "not the structure and weights"),
        (lambda b: b["ops"][1].update(patches=[[1, 1]] * 4), "not the structure and weights"),
        (lambda b: b["ops"][2].update(name="lost"), "is not one|wrong shape: lost.weight"),
    ],
)
def test_damaged_structures_are_refused(program, tmp_path, change, message):
    program.save(tmp_path)
    rewrite_json(tmp_path, change)
    with pytest.raises(BundleError, match=message):
        Program.load(tmp_path)


def test_shapes_are_checked_without_weights_too(program, tmp_path):
    program.save(tmp_path)
    rewrite_json(tmp_path, lambda b: b["ops"][0].update(stride=[2, 2]))
    with pytest.raises(BundleError, match="does not fit"):
        Program.load(tmp_path, weights=False)


@settings(max_examples=40)
@given(st.data())
def test_a_flipped_bit_of_the_weights_is_noticed(tmp_path_factory, data):
    program = lower(Chain(conv(3, 4), BlockReLU(PATCHES), conv(4, 2)).eval(), SHAPE)
    directory = tmp_path_factory.mktemp("program")
    program.save(directory)
    path = directory / "program.safetensors"
    body = bytearray(path.read_bytes())
    weights = sum(t.nbytes for t in program.tensors.values())
    body[-data.draw(st.integers(1, weights))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(body)
    with pytest.raises(BundleError, match=r"not the structure and weights|not finite"):
        Program.load(directory)


DEEP = b"[" * 10_000 + b"]" * 10_000


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b'"x"', DEEP])
def test_files_that_are_not_json_objects_are_refused(program, tmp_path, damaged):
    program.save(tmp_path)
    (tmp_path / "program.json").write_bytes(damaged)
    with pytest.raises(BundleError, match="damaged"):
        Program.load(tmp_path)


@pytest.mark.parametrize("file", ["program.json", "program.safetensors"])
def test_truncated_and_missing_files_are_refused(program, tmp_path, file):
    program.save(tmp_path)
    path = tmp_path / file
    whole = path.read_bytes()
    for size in (0, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(BundleError, match="damaged"):
            Program.load(tmp_path)
    path.unlink()
    with pytest.raises(BundleError, match=rf"no program(.|\n)*{tmp_path}(.|\n)*tightrope finetune"):
        Program.load(tmp_path)


@settings(max_examples=60)
@given(st.data())
def test_a_flipped_byte_of_the_structure_never_gives_a_traceback(tmp_path_factory, data):
    """Either the file still says a program, or a BundleError says that it does not."""
    program = lower(Chain(conv(3, 4), BlockReLU(PATCHES), conv(4, 2)).eval(), SHAPE)
    directory = tmp_path_factory.mktemp("program")
    program.save(directory)
    path = directory / "program.json"
    body = bytearray(path.read_bytes())
    body[data.draw(st.integers(0, len(body) - 1))] ^= 1 << data.draw(st.integers(0, 6))
    path.write_bytes(body)
    with suppress(BundleError):
        assert isinstance(Program.load(directory), Program)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("parts.3.bias"), "missing(.|\n)*parts.3.bias"),
        (
            lambda t: t.update({"parts.3.bias": np.zeros(3, np.float32)}),
            r"parts.3.bias(.|\n)*\(3,\)(.|\n)*\(2,\)",
        ),
        (
            lambda t: t.update({"parts.0.weight": t["parts.0.weight"] * np.nan}),
            "not finite(.|\n)*parts.0.weight",
        ),
    ],
)
def test_missing_and_wrong_weights_are_refused(program, tmp_path, change, message):
    program.save(tmp_path)
    path = tmp_path / "program.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(BundleError, match=message):
        Program.load(tmp_path)


def test_a_program_is_checked_when_it_is_made():
    op = Add(name="sum", inputs=("input", "ghost"), shape=SHAPE)
    with pytest.raises(BundleError, match="ghost"):
        Program((op,), SHAPE, "sum")
    with pytest.raises(BundleError, match="not one of its values"):
        Program((), SHAPE, "sum")
    assert Program((), SHAPE, Program.INPUT).shape("input") == SHAPE


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 3, 8, 9)), r"wrong input shape(.|\n)*\(2, 3, 8, 9\)(.|\n)*\(N, 3, 8, 8\)"),
        (np.zeros((3, 8, 8)), "wrong input shape"),
        (np.zeros((0, 3, 8, 8)), "wrong input shape"),
        (np.full((1, 3, 8, 8), np.nan), "NaN or infinity"),
        (np.full((1, 3, 8, 8), -np.inf), "NaN or infinity"),
    ],
)
def test_inputs_are_checked(program, x, message):
    with pytest.raises(InputError, match=message):
        program.check_input(x)


def test_the_language_is_closed_and_every_kind_is_its_own():
    assert all(kind == cls.kind for kind, cls in OPS.items())
    assert set(OPS.values()) == {cls for cls in Op.__subclasses__() if cls.__module__ == Op.__module__}


def test_costs_of_single_ops():
    wide = Conv2d(
        name="c", inputs=("input",), shape=(6, 4, 5), kernel=(3, 2), stride=(2, 1), groups=3, in_channels=9
    )
    weights = 6 * 3 * 3 * 2
    assert base_cost(wide).macs == weights * 4 * 5
    assert base_cost(wide).weights == weights + 6
    pool = MaxPool2d(name="m", inputs=("input",), shape=(2, 4, 4), kernel=(3, 3), stride=(2, 2))
    assert base_cost(pool).as_dict() == {"drelus": 8 * 32}
    assert base_cost(Add(name="a", inputs=("input", "input"), shape=SHAPE)).as_dict() == {}


@settings(max_examples=200)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 45), st.integers(1, 45), st.booleans())
def test_tiles_are_counted_pixel_by_pixel(H, W, p, q, clipped):
    patches, upper = ((p, q), (0, 0), (1, 1)), 6.0 if clipped else None
    relu = Relu(name="r", inputs=("input",), shape=(3, H, W), patches=patches, upper=upper)
    counted = len({(i // p, j // q) for i in range(H) for j in range(W)})
    assert relu.tiles == (counted, 0, H * W)
    assert base_cost(relu).drelus == (counted + H * W) * (2 if clipped else 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_those_of_the_network_without_batch_norm(name):
    """Folding keeps every weight; a bias per output channel is added."""
    model = settle(NETWORKS[name]())
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    extra = {"concat": 2 * (4 + 7 + 10)}.get(name, 0)  # batch-norms with no convolution before them
    expected = sum(m.weight.numel() + len(m.weight) for m in layers) + extra
    program = lower(model, SHAPE)
    assert sum(base_cost(op).weights for op in program.ops) == expected
    assert sum(math.prod(t.shape) for t in program.tensors.values()) == expected
