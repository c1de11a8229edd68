"""One suite for every runtime: the outputs of `plain`, the costs it predicted, clear refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ckks_toys import ToyCKKS
from small_networks import NETWORKS, images, network
from tightrope.errors import InputError, TraceError
from tightrope.lower import lower
from tightrope.nn import PolynomialActivation
from tightrope.program import OPS, Program
from tightrope.runtimes.mpc import MPC, costs
from tightrope.runtimes.onnx import Onnx
from tightrope.runtimes.openvino import OpenVino
from tightrope.runtimes.plain import Plain, evaluate, ranges
from tightrope.types import Cost, total

BATCH = 5


@dataclass(frozen=True)
class Subject:
    """A runtime in one mode, how far its outputs may be from float64, and what it predicts for one sample."""

    runtime: Any
    mode: Literal["simulate", "execute"]
    tolerance: float
    predict: Callable[[Program], Mapping[str, Cost]]


def counted(config: MPC) -> Callable[[Program], Mapping[str, Cost]]:
    return lambda program: costs(program, config).ops


def timeless(program: Program) -> Mapping[str, Cost]:
    return {name: replace(cost, online_ms=0) for name, cost in ToyCKKS().estimate(program).ops.items()}


SMALL = MPC(noise_bits=0, ring_bits=32, fraction_bits=11, weight_bits=11, margin=2.0)
SUBJECTS = {
    "plain": Subject(Plain(), "execute", 0.0, Plain().prices),
    "onnx": Subject(Onnx(), "execute", 2.0**-16, Onnx().prices),
    "openvino": Subject(OpenVino(), "execute", 2.0**-16, OpenVino().prices),
    "mpc simulate": Subject(MPC(noise_bits=0), "simulate", 2.0**-16, counted(MPC())),
    "mpc in 32 bits": Subject(SMALL, "simulate", 2.0**-6, counted(SMALL)),
    "mpc execute": Subject(MPC(noise_bits=0), "execute", 2.0**-16, counted(MPC())),
    "ckks simulate": Subject(ToyCKKS(), "simulate", 1e-12, timeless),
    "ckks execute": Subject(ToyCKKS(), "execute", 1e-5, timeless),
}
ENGINES = ("onnx", "openvino")  # which have no ReLU with patches: see the test of refusals
PATCHED = ("patches", "whole maps")
CASES = [
    pytest.param(
        (subject, name), id=f"{subject}-{name}", marks=[pytest.mark.slow] * (subject == "mpc execute")
    )
    for subject in SUBJECTS
    for name in NETWORKS
    if ("ckks" not in subject or name == "polynomials")  # the others have signs
    and (name not in PATCHED or subject not in ENGINES)
]


@pytest.fixture(scope="module", params=CASES)
def opened(request: pytest.FixtureRequest) -> Iterator[tuple[Subject, Program, Any]]:
    subject, program = SUBJECTS[request.param[0]], network(request.param[1])
    with subject.runtime.open(program, subject.mode) as session:
        yield subject, program, session


def test_outputs_are_those_of_plain(opened: tuple[Subject, Program, Any]) -> None:
    subject, program, session = opened
    for seed in (5, 6):  # a session runs many batches
        x = images(BATCH, seed)
        y, measured = session.run(x.numpy())
        want = evaluate(program, x).numpy()
        assert y.shape == want.shape and y.dtype == np.float64
        assert np.abs(y - want).max() <= subject.tolerance
        assert measured.batch == BATCH


def test_predicted_costs_are_the_measured_ones(opened: tuple[Subject, Program, Any]) -> None:
    subject, program, session = opened
    _, measured = session.run(images(1).numpy())
    assert [trace.op for trace in measured.ops] == [op.name for op in program.ops]
    predicted = subject.predict(program)
    for trace in measured.ops:
        spent = replace(trace.cost, online_ms=0, offline_ms=0)
        assert spent == predicted[trace.op], trace.op
        if trace.kind == "relu":
            assert spent.drelus == program.op(trace.op).drelus
    assert measured.total.online_ms > 0


def test_links_carry_what_the_ops_say(opened: tuple[Subject, Program, Any]) -> None:
    subject, program, session = opened
    _, measured = session.run(images(BATCH).numpy())
    assert sum(measured.links.values()) == measured.total.online_bytes
    assert sum(measured.offline_links.values()) == measured.total.offline_bytes
    if isinstance(subject.runtime, MPC):
        predicted = costs(program, subject.runtime, BATCH)
        assert measured.links == predicted.links
        assert measured.offline_links == predicted.offline_links
        assert session.setup_links == predicted.setup_links
        assert measured.total.rounds == predicted.total.rounds > 0
        assert not any("dealer" in link for link in measured.links)  # which may be off-line then


def test_wrong_inputs_are_refused_and_do_no_harm(opened: tuple[Subject, Program, Any]) -> None:
    _, program, session = opened
    shape = (2, *program.input_shape)
    for wrong in (
        np.zeros(shape[1:]),
        np.zeros((0, *shape[1:])),
        np.zeros((*shape, 1)),
        np.full(shape, np.nan),
    ):
        with pytest.raises(InputError, match="input"):
            session.run(wrong)
    session.run(images(1).numpy())


class Squeeze(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * x


USES: dict[str, nn.Module] = {
    "max_pool": nn.MaxPool2d(2),
    "mul": Squeeze(),
    "sigmoid": nn.Sigmoid(),
    "hard_sigmoid": nn.Hardsigmoid(),
    "silu": nn.SiLU(),
    "hard_swish": nn.Hardswish(),
    "polynomial": PolynomialActivation([[0.0, 0.5, 0.25]], gated=False),
}


@pytest.mark.parametrize("kind", USES)
@pytest.mark.parametrize("name", SUBJECTS)
def test_an_op_outside_the_runtime_is_refused_by_kind_and_name(name: str, kind: str) -> None:
    subject = SUBJECTS[name]
    model = nn.Sequential(nn.Conv2d(2, 2, 1), USES[kind])
    program = ranges(lower(model.eval(), (2, 4, 4)), [torch.randn(8, 2, 4, 4)])
    op = next(op for op in program.ops if op.kind == kind)
    if kind in subject.runtime.ops:
        with subject.runtime.open(program, subject.mode) as session:
            session.run(np.zeros((1, 2, 4, 4)))
        return
    with pytest.raises(TraceError) as error:
        subject.runtime.open(program, subject.mode)
    assert kind in str(error.value) and f"where:   {op.name}\n" in str(error.value)


@pytest.mark.parametrize("name", ENGINES)
def test_engines_refuse_patches(name: str) -> None:
    with pytest.raises(TraceError, match=r"shared over a patch(.|\n)*where"):
        SUBJECTS[name].runtime.open(network("patches"))


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_op_is_known_to_programs(name: str) -> None:
    assert SUBJECTS[name].runtime.ops <= OPS.keys()


@pytest.mark.parametrize("name", SUBJECTS)
def test_exact_prices_are_what_a_run_of_one_sample_counts(name: str) -> None:
    subject, program = SUBJECTS[name], network("polynomials" if "ckks" in name else "residual")
    pricing = subject.runtime.pricing()
    again = subject.runtime.pricing(**pricing.settings)
    exact = again.exact(program)
    timed = {"online_ms": 0.0} if name in ENGINES else {}  # measured anew every time
    assert replace(exact, **timed) == replace(pricing.exact(program), **timed)
    with subject.runtime.open(program, "simulate" if name != "plain" else "execute") as session:
        _, measured = session.run(images(1).numpy())
    for metric in ("drelus", "macs", "weights", "online_bytes", "offline_bytes", "rounds"):
        assert getattr(exact, metric) == getattr(measured.total, metric), metric
    summed = total(pricing.prices(program).values())
    for metric in {"drelus", "online_bytes", "offline_bytes", "online_ms"} - pricing.approximate:
        assert getattr(summed, metric) == getattr(exact, metric), metric


def test_a_runtime_that_sends_nothing_predicts_no_time() -> None:
    for refused in (
        lambda: Plain().pricing(network="lan"),
        lambda: Plain().estimate(network("residual")),
        lambda: Plain().calibrate(lambda *_: None),
    ):
        with pytest.raises(InputError, match="predicts no time"):
            refused()
