"""Polynomial activations: against numpy's polynomials, in training, lowered, saved, and secure."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.polynomial import polynomial as npoly
from safetensors.torch import load as safe_load
from safetensors.torch import save as safe_save
from torch import nn

from tightrope.errors import BundleError, InputError, TraceError
from tightrope.graph import trace
from tightrope.lower import lower
from tightrope.methods.paf.library import names, paf
from tightrope.nn import PolynomialActivation
from tightrope.nn.polynomial import composite
from tightrope.ops import Polynomial, base_cost
from tightrope.place import tensors_sha256
from tightrope.program import Program, deepest
from tightrope.runtimes.mpc import MPC, compile_program, oracle
from tightrope.runtimes.plain import Plain, evaluate, ranges

SIGN = [[0, 2.076171875, 0, -1.3271484375], [0, 1.5, 0, -0.5]]
A7 = [
    [0, 7.30445164958251, 0, -34.6825871108659, 0, 59.8596518298826, 0, -31.8755225906466],
    [0, 2.40085652217597, 0, -2.63125454261783, 0, 1.54912674773593, 0, -0.331172956504304],
]


@given(
    degrees=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    gated=st.booleans(),
    per_channel=st.booleans(),
    scale=st.floats(0.1, 50),
    seed=st.integers(0, 99),
)
def test_a_composite_is_that_of_numpy_before_and_after_lowering(degrees, gated, per_channel, scale, seed):
    rng = np.random.default_rng(seed)
    stages = [rng.uniform(-1, 1, (3, d + 1) if per_channel else (d + 1,)) for d in degrees]
    module = PolynomialActivation(stages, gated=gated, scale=scale).double()
    x = rng.uniform(-scale, scale, (2, 3, 4, 5))
    want = x / np.float32(scale)
    for k in range(len(stages)):
        stage = np.broadcast_to(stages[k], (3, degrees[k] + 1))
        want = np.stack([npoly.polyval(want[:, c], stage[c]) for c in range(3)], 1)
    want = x * want if gated else want
    assert np.allclose(module(torch.from_numpy(x)).detach(), want, rtol=1e-9, atol=1e-9)
    program = lower(nn.Sequential(module), (3, 4, 5))
    assert np.allclose(evaluate(program, torch.from_numpy(x)), want, rtol=1e-6, atol=1e-6 * abs(want).max())
    (op,) = program.ops
    assert isinstance(op, Polynomial) and op.stages == tuple(degrees) and op.gated == gated
    depth = sum(int(np.ceil(np.log2(d + 1))) for d in degrees) + gated
    assert base_cost(op).ckks_levels == depth
    assert all(t.dtype == np.float64 for t in program.tensors.values())


def test_relu_folds_the_half_into_the_last_stage():
    x = torch.linspace(-3, 3, 101)[None, :, None, None]
    sign = npoly.polyval(npoly.polyval(x.double().numpy() / 4, SIGN[0]), SIGN[1])
    y = PolynomialActivation.relu(SIGN, scale=4.0)(x)
    assert np.allclose(y.detach(), x.numpy() * (1 + sign) / 2, atol=1e-6)


def test_a_dynamic_scale_is_that_of_the_batch_and_must_be_frozen():
    module = PolynomialActivation.relu(SIGN, dynamic=True)
    x = torch.tensor([[[[-8.0, 4.0, 2.0]]]])
    assert torch.equal(module(x), PolynomialActivation.relu(SIGN, scale=8.0)(x))
    assert module(torch.zeros(1, 1, 2, 2)).abs().max() == 0
    with pytest.raises(TraceError, match="freeze"):
        lower(nn.Sequential(module), (1, 1, 3))
    module.freeze(8.0)
    assert lower(nn.Sequential(module), (1, 1, 3)).ops[0].stages == (3, 3)


@pytest.mark.parametrize("scale", [0.25, 1.0, 5.7])
@pytest.mark.parametrize("name", names())
def test_every_polynomial_of_the_library_is_as_near_to_relu_as_the_library_says(name, scale):
    """The module in float32, and the op that it is lowered to."""
    p, factor = paf(name), float(np.float32(scale))
    make = PolynomialActivation.relu if p.gated else partial(PolynomialActivation, gated=False)
    module = make(p.stages, scale=scale)
    u = np.linspace(-1, 1, 200_001)
    x = factor * u[:, None]
    gain = factor if p.gated else 1.0  # of what stands in the gate
    program = lower(nn.Sequential(module), (1,))
    got = evaluate(program, torch.from_numpy(x)).numpy()[:, 0] / gain
    assert np.abs(got - p.activation(u)).max() < 1e-9  # rounding, which 15,15,27 enlarges
    assert np.abs(got - np.maximum(u, 0)).max() == pytest.approx(p.relu_error(), rel=1e-6)
    with torch.no_grad():
        single = module(torch.from_numpy(x).float())
    assert single.dtype == torch.float32
    inputs = np.float32(x)[:, 0] / factor  # float32 has 2^-24 of an input, which is steep at 0
    error = np.abs(single[:, 0].double().numpy() / gain - np.maximum(inputs, 0)).max()
    assert error == pytest.approx(p.relu_error(), rel=1e-4)


def test_coefficients_stay_float64_through_casts_and_files():
    """15,15,27 with coefficients in float32 is 43 times farther from ReLU."""
    module = PolynomialActivation.relu(paf("15,15,27").stages, scale=3.0)
    exact = [stage.detach().clone() for stage in module.stages]
    assert {stage.dtype for stage in exact} == {torch.float64}
    module(torch.ones(1, 1)).sum().backward()
    for cast in (nn.Module.double, nn.Module.float, nn.Module.bfloat16, partial(nn.Module.to, device="cpu")):
        cast(module)
        assert all(torch.equal(a, b) for a, b in zip(exact, module.stages, strict=True))
        assert all(stage.grad.dtype == torch.float64 for stage in module.stages)
    again = PolynomialActivation([torch.zeros(len(stage)) for stage in exact], gated=True)
    again.load_state_dict(safe_load(safe_save(module.float().state_dict())))
    assert all(torch.equal(a, b) for a, b in zip(exact, again.stages, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(module.folded(), again.folded(), strict=True))


def test_a_state_in_float32_comes_back_as_it_was_and_one_in_float64_after_it():
    """As earlier versions saved it: the hash of such a network is what their plans have."""
    module = PolynomialActivation.relu(A7, scale=4.0)
    now = {name: t.clone() for name, t in module.state_dict().items()}
    earlier = {name: t.float() for name, t in now.items()}
    module.load_state_dict(earlier)
    assert tensors_sha256(module.state_dict()) == tensors_sha256(earlier)
    assert all(isinstance(stage, nn.Parameter) and stage.requires_grad for stage in module.stages)
    assert lower(nn.Sequential(module), (1,)).tensors["0.stage0"][1] == np.float32(A7[0][1]) / 4.0
    module.load_state_dict(now)
    assert tensors_sha256(module.state_dict()) == tensors_sha256(now) != tensors_sha256(earlier)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_network_that_begins_with_a_polynomial_is_traced_in_the_type_of_its_weights(dtype):
    net = nn.Sequential(PolynomialActivation.relu(A7, scale=4.0), nn.Conv2d(2, 3, 1)).to(dtype)
    assert [site.kind for site in trace(net, (2, 4, 4)).sites] == ["polynomial"]
    assert len(lower(net, (2, 4, 4)).ops) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("stages", [A7, [[[0.1, 0.5, 0.2], [0.0, 1.0, 0.1]]], paf("15,15,27").stages])
def test_outputs_have_the_type_of_the_inputs_and_gradients_that_of_the_coefficients(stages, dtype):
    module = PolynomialActivation(stages, gated=True, scale=2.0)
    x = torch.linspace(-1, 1, 12).reshape(2, 2, 3).to(dtype).requires_grad_()
    y = module(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype and x.grad.isfinite().all()
    assert all(stage.grad.dtype == torch.float64 for stage in module.stages)
    if dtype == torch.float32 and stages is A7:  # as rounded coefficients would have it, bit by bit
        want = composite([stage.detach().float() for stage in module.stages], x.detach() / 2)[-1]
        assert torch.equal(y.detach(), x.detach() * want)


def test_a_device_without_float64_rounds_what_float32_can_evaluate_and_refuses_the_rest():
    def move(t: torch.Tensor) -> torch.Tensor:
        if t.dtype == torch.float64:
            raise TypeError("no float64 here")  # as mps does
        return t.clone()

    module = PolynomialActivation.relu(paf("7,7,13").stages)._apply(move)
    assert {stage.dtype for stage in module.stages} == {torch.float32}
    with pytest.raises(InputError, match="needs float64") as error:
        PolynomialActivation.relu(paf("15,15,27").stages)._apply(move)
    assert "degree 15" in str(error.value) and "--accelerator cpu" in str(error.value)


def test_every_call_is_a_site_of_its_own():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = PolynomialActivation.relu(SIGN, scale=4.0)

        def forward(self, x):
            return self.act(self.act(x) - 1)

    sites = trace(Twice(), (2, 3, 3)).sites
    assert [(s.name, s.kind) for s in sites] == [("act", "polynomial"), ("act_1", "polynomial")]


@pytest.mark.parametrize("stages", [[], [[1.0]], [[1.0, np.nan]], [np.zeros((1, 2, 3))]])
def test_what_is_no_polynomial_is_refused(stages):
    with pytest.raises(InputError):
        PolynomialActivation(stages, gated=False)
    with pytest.raises(InputError, match="scale"):
        PolynomialActivation(SIGN, gated=True, scale=0.0)


def program(stages=A7, scale=4.0, gated=True) -> Program:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), PolynomialActivation(stages, gated=gated, scale=scale)).eval()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.zero_()
    return ranges(lower(model, (1, 4, 4)), [torch.linspace(-3.5, 3.5, 64).reshape(4, 1, 4, 4)])


def test_a_saved_polynomial_comes_back_and_a_damaged_one_is_refused(tmp_path: Path):
    saved = program()
    saved.save(tmp_path)
    loaded = Program.load(tmp_path)
    assert loaded == replace(saved, tensors=loaded.tensors)
    assert all(np.array_equal(loaded.tensors[k], v) for k, v in saved.tensors.items())
    for name, tensor in (("1.stage1", np.zeros(7)), ("1.stage0", np.full(8, np.inf))):
        replace(saved, tensors=dict(saved.tensors) | {name: tensor}).save(tmp_path)
        with pytest.raises(BundleError, match=name.replace(".", r"\.")):
            Program.load(tmp_path)
    for stages in ((), (0,), (64,)):
        op = replace(saved.op("1"), stages=stages)
        replace(saved, ops=(saved.ops[0], op)).save(tmp_path)
        with pytest.raises(BundleError, match="does not fit"):
            Program.load(tmp_path)


def test_levels_belong_to_the_deepest_path():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.deep, self.flat = PolynomialActivation.relu(A7), PolynomialActivation.relu(SIGN)

        def forward(self, x):
            return self.flat(x) + self.deep(x)

    lowered = lower(Branch(), (1, 2, 2))
    _, measured = Plain().open(lowered).run(np.zeros((3, 1, 2, 2)))
    assert measured.total.ckks_levels == 7
    levels = {op.name: Plain().price(op).ckks_levels for op in lowered.ops}
    assert deepest(lowered, levels) == 7 and sorted(levels.values()) == [0, 5, 7]


@pytest.mark.parametrize("stages", [A7, SIGN, [[0.25, 1.0]], [[0.1, 0.5, 0.3, 0.0, 0.2, 0.1]]])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("scale", [0.25, 4.0, 100.0])
def test_secure_polynomials_equal_plain_whatever_their_scale(stages, gated, scale):
    config = MPC(noise_bits=0)
    small = nn.Sequential(PolynomialActivation(stages, gated=gated, scale=scale)).eval()
    x = scale * torch.linspace(-1, 1, 64).reshape(4, 1, 4, 4)
    lowered = ranges(lower(small, (1, 4, 4)), [x])
    want = evaluate(lowered, x).numpy()
    with config.open(lowered, "simulate") as session:
        got = session.run(x.numpy())[0]
    bound = 2**-13 * max(1.0, scale if gated else 1.0)
    assert np.abs(got - want).max() < bound
    model = oracle.evaluate(lowered, compile_program(lowered, config), x.numpy())
    assert np.abs(model - want).max() < bound


def test_a_power_without_room_in_the_ring_is_refused_with_a_remedy():
    deep, narrow = program([[0.0] * 13 + [1.0]], gated=False), MPC(ring_bits=32, weight_bits=8)
    with pytest.raises(InputError, match="overflow") as error:
        compile_program(deep, replace(narrow, fraction_bits=15))
    assert "where:   1\n" in str(error.value) and "MPC(fraction_bits=14)" in str(error.value)
    compile_program(deep, replace(narrow, fraction_bits=14))


def test_a_power_has_room_for_what_the_input_margin_lets_in():
    """At 28 fractional bits x^13 has room for 1.38 times its range: a party that lets 1.5 in is refused."""
    net = nn.Sequential(PolynomialActivation([[0.0] * 13 + [1.0]], gated=False)).eval()
    deep = ranges(lower(net, (1, 1, 2)), [torch.full((1, 1, 1, 2), 1.0)])
    config = MPC(fraction_bits=28, input_margin=1.3)
    compile_program(deep, config)
    with pytest.raises(InputError, match=r"1\.5 times their range[\s\S]*MPC\(fraction_bits=27\)"):
        compile_program(deep, replace(config, input_margin=1.5))
    compile_program(deep, replace(config, input_margin=1.5, fraction_bits=27))


@pytest.mark.parametrize("margin", [1.0, 1.25, 4.0])
@pytest.mark.parametrize("ratio", [0.55, 0.8, 1.0])
def test_a_high_power_has_its_least_margin(margin, ratio):
    """x^13 of a value at that margin, in its range of `ratio` to a power of two, does not wrap."""
    stages = [[0.0] * 13 + [1.0]]
    deep = ranges(
        lower(nn.Sequential(PolynomialActivation(stages, gated=False)).eval(), (1, 1, 2)),
        [torch.full((1, 1, 1, 2), ratio)],
    )
    config = MPC(noise_bits=0, margin=margin, input_margin=1.25)
    x = np.array([1.0, -1.0]).reshape(1, 1, 1, 2) * ratio * min(margin, 1.25) * (1 - 1e-6)
    got = oracle.evaluate(deep, compile_program(deep, config), x)
    assert np.abs(got - x**13).max() < 2**-13 * max(1.0, np.abs(x**13).max())


@pytest.mark.parametrize("scale", [0.25, 5.7])
@pytest.mark.parametrize("name", [name for name in names() if paf(name).gated and name != "15,15,27"])
def test_every_composite_that_is_not_refused_has_its_digits(name, scale):
    net = nn.Sequential(PolynomialActivation.relu(paf(name).stages, scale=scale)).eval()
    x = scale * torch.linspace(-1, 1, 256).double().reshape(1, 1, 16, 16)
    lowered = ranges(lower(net, (1, 16, 16)), [x])
    got = oracle.evaluate(lowered, compile_program(lowered, MPC(noise_bits=0)), x.numpy())
    assert np.abs(got - evaluate(lowered, x).numpy()).max() < 2**-10 * scale


def test_a_composite_without_digits_is_refused_with_a_remedy_and_has_no_price():
    lowered = program(paf("15,15,27").stages, gated=True)
    for refuse in (lambda: compile_program(lowered, MPC()), lambda: MPC().price(lowered.op("1"))):
        with pytest.raises(TraceError, match="not the digits") as error:
            refuse()
        assert "degrees up to 13" in str(error.value) and "15, 15, 27" in str(error.value)
    shallow = program(paf("7,7,13").stages, gated=True)
    compile_program(shallow, MPC())
    assert MPC().price(shallow.op("1")).online_bytes > 0
