"""lower: the Program computes what the torch module computes, in the fewest ops."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import nn

from generated import cnns
from networks import NETWORKS, Chain, TinyResNet, conv, gap, settle
from tightrope.errors import TraceError
from tightrope.lower import lower
from tightrope.nn import BlockReLU
from tightrope.program import Conv2d, Program, Relu
from tightrope.runtimes.plain import evaluate

SHAPE = (3, 8, 8)


def lowered(*steps, shape=SHAPE, tolerance=1e-6) -> list[str]:
    """The kinds of the ops, after checking that the program equals the network."""
    model = settle(Chain(*steps))
    program = lower(model, shape)
    assert gap(model, program, torch.randn(3, *shape)) < tolerance
    return [op.kind for op in program.ops]


@settings(max_examples=120)
@given(cnns())
def test_random_networks_equal_torch(generated):
    model, shape = generated
    program = lower(model, shape)
    x = torch.randn(3, *shape)
    assert gap(model, program, x) < 1e-5
    assert len({op.name for op in program.ops}) == len(program.ops)
    evaluate(program, x, lambda op, value, ms: _shape_is_right(op, value))
    weights = {key.rpartition(".")[0] for key in program.tensors}
    assert weights == {op.name for op in program.ops if op.kind in ("conv2d", "linear")}
    assert all(t.dtype == "float32" for t in program.tensors.values())


def _shape_is_right(op, value):
    assert tuple(value.shape[1:]) == op.shape, op


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_equal_torch(name):
    model = settle(NETWORKS[name]())
    assert gap(model, lower(model, SHAPE), torch.randn(4, *SHAPE)) < 1e-5


def norm(channels=3, **options) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, **options)


def test_batch_norm_folds_into_the_convolution_before_it():
    assert lowered(conv(3, 4), norm(4), F.relu) == ["conv2d", "relu"]
    assert lowered(conv(3, 4, bias=False), norm(4), norm(4)) == ["conv2d"]
    assert lowered(conv(3, 4), norm(4, affine=False, eps=0.1)) == ["conv2d"]
    assert lowered(conv(3, 6, groups=3), nn.Dropout(), nn.Identity(), norm(6)) == ["conv2d"]


def test_batch_norm_elsewhere_becomes_a_convolution_of_its_own():
    assert lowered(norm(), conv(3, 4)) == ["conv2d", "conv2d"]
    assert lowered(conv(3, 3), F.relu, norm()) == ["conv2d", "relu", "conv2d"]
    program = lower(settle(Chain(norm())), SHAPE)
    op = program.ops[0]
    assert isinstance(op, Conv2d)
    assert (op.groups, op.kernel, op.weight_shape) == (3, (1, 1), (3, 1, 1, 1))


class Shared(nn.Module):
    """A convolution whose value two readers take: batch-norm (through `between`) and a sum."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.conv, self.between, self.norm = conv(3, 3), between, norm()

    def forward(self, x):
        y = self.conv(x)
        return self.norm(self.between(y)) + y


@pytest.mark.parametrize("between", [nn.Identity(), nn.Dropout(), nn.Sequential()])
def test_a_convolution_with_two_readers_is_not_folded_into(between):
    model = settle(Shared(between))
    program = lower(model, SHAPE)
    assert [op.kind for op in program.ops] == ["conv2d", "conv2d", "add"]
    assert gap(model, program, torch.randn(2, *SHAPE)) < 1e-6


class CalledTwice(nn.Module):
    """One convolution and two batch-norms: each call is folded for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b = conv(3, 3), norm(), norm()

    def forward(self, x):
        return self.b(self.conv(F.relu(self.a(self.conv(x)))))


def test_a_convolution_called_twice_is_two_ops_with_their_own_weights():
    model = settle(CalledTwice())
    program = lower(model, SHAPE)
    assert [op.name for op in program.ops] == ["conv", "relu", "conv_1"]
    assert gap(model, program, torch.randn(2, *SHAPE)) < 1e-6
    assert (program.tensors["conv.weight"] != program.tensors["conv_1.weight"]).any()


def test_batch_norm_after_concatenation():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.last = conv(3, 4), norm(7), conv(7, 2)

        def forward(self, x):
            return self.last(self.norm(torch.cat((self.conv(x), x), dim=-3)))

    model = settle(Joined())
    program = lower(model, SHAPE)
    assert [op.kind for op in program.ops] == ["conv2d", "concat", "conv2d", "conv2d"]
    assert gap(model, program, torch.randn(2, *SHAPE)) < 1e-6


def test_same_padding_of_even_kernels():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: may need a padded copy
        layers = [nn.Conv2d(3, 3, (2, 4), padding="same", dilation=d) for d in (1, 2)]
        assert lowered(*layers) == ["conv2d", "conv2d"]


def test_layers_that_do_nothing_leave_no_op():
    nothing = (nn.Identity(), nn.Dropout(), nn.Dropout2d(), lambda x: x.contiguous())
    assert lowered(*nothing, conv(3, 2)) == ["conv2d"]
    assert lowered(nn.AdaptiveAvgPool2d(8), conv(3, 2)) == ["conv2d"]
    assert lowered(lambda x: F.dropout(x, training=False), nn.Flatten(), nn.Flatten()) == ["flatten"]


def test_adaptive_pools():
    assert lowered(nn.AdaptiveAvgPool2d(1)) == ["global_avg_pool"]
    assert lowered(nn.AdaptiveAvgPool2d((2, 4))) == ["avg_pool"]
    assert lowered(nn.AdaptiveAvgPool2d((7, 7)), shape=(2, 1, 1)) == ["upsample"]
    with pytest.raises(TraceError, match=r"unequal windows(.|\n)*pool(.|\n)*8x8 -> 3x3"):
        lower(_Named("pool", nn.AdaptiveAvgPool2d(3)), SHAPE)


class _Named(nn.Module):
    """One layer under a chosen name."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.add_module(name, layer)
        self.name = name

    def forward(self, x):
        return getattr(self, self.name)(x)


def test_constants_and_named_arguments():
    assert lowered(lambda x: 2 * x + 0.5) == ["conv2d", "conv2d"]
    assert lowered(lambda x: torch.add(x, torch.mul(x, x))) == ["mul", "add"]
    assert lowered(lambda x: torch.cat(tensors=[x, x], dim=1)) == ["concat"]
    assert lowered(lambda x: F.avg_pool2d(input=x, kernel_size=2, stride=[1, 2])) == ["avg_pool"]
    assert lowered(lambda x: F.interpolate(x, None, 2, "bilinear", False)) == ["upsample"]
    assert lowered(lambda x: F.interpolate(x, size=(16, 24))) == ["upsample"]


@pytest.mark.parametrize(
    ("layer", "got"),
    [
        (nn.LeakyReLU(), "LeakyReLU"),
        (nn.GELU(), "GELU"),
        (nn.GroupNorm(1, 3), "GroupNorm"),
        (nn.InstanceNorm2d(3), "InstanceNorm2d"),
        (nn.ConvTranspose2d(3, 3, 2), "ConvTranspose2d"),
        (nn.Softmax(1), "Softmax"),
    ],
)
def test_an_unknown_layer_is_named_with_its_place(layer, got):
    message = rf"cannot be lowered(.|\n)*'head.odd'(.|\n)*got: +{got}(.|\n)*Conv2d"
    with pytest.raises(TraceError, match=message):
        lower(_Named("head", _Named("odd", layer)).eval(), SHAPE)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (torch.tanh, r"cannot be lowered(.|\n)*tanh"),
        (lambda x: x.transpose(1, 2), r"cannot be lowered(.|\n)*transpose"),
        (lambda x: x.clamp(-1, 1), r"cannot be lowered(.|\n)*clamp"),
        (lambda x: x - x, r"cannot be lowered(.|\n)*sub"),
        (lambda x: x.mean(1), r"mean over \(H, W\)"),
        (lambda x: x.mean((2,)), r"mean over \(H, W\)"),
        (lambda x: x.mean(), r"mean over \(H, W\)"),
        (lambda x: x.view(-1, 3, 64), "only flattening"),
        (lambda x: x.view(-1, 2), "only flattening"),
        (lambda x: torch.flatten(x, 2), "only flattening"),
        (lambda x: torch.cat([x, x], 2), "concatenation of channels"),
        (lambda x: torch.cat([x, x]), "concatenation of channels"),
        (lambda x: torch.add(x, x, alpha=2), "named arguments"),
        (lambda x: x + x.mean((2, 3), keepdim=True), "different shapes"),
        (lambda x: x * x[:, :1], "cannot be lowered"),
        (lambda x: x.flatten(1) + 1, "constant can be folded"),
        (lambda x: F.pad(x, (1, 1, 1, 1), "reflect"), "zero padding"),
        (lambda x: F.pad(x, (1, 1, 1, 1), value=1.0), "zero padding"),
        (lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)), "zero padding"),
        (lambda x: F.avg_pool2d(x, 2, divisor_override=3), "divisor_override"),
        (lambda x: F.interpolate(x, scale_factor=1.5), "whole factors"),
        (lambda x: F.interpolate(x, None, 2, "bicubic"), "nearest or bilinear"),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True), "align_corners"),
        (nn.Linear(8, 4), "flat input"),
        (conv(3, 3, padding_mode="reflect"), "zero padding"),
        (nn.BatchNorm2d(3, track_running_stats=False), "without running statistics"),
        (lambda x: x + torch.ones(8), "cannot be lowered|not a traced tensor"),
    ],
)
def test_what_a_program_cannot_say_is_an_error(step, message):
    """Never a program that computes something else."""
    with pytest.raises(TraceError, match=message):
        lower(Chain(conv(3, 3), step).eval(), SHAPE)


class WithShapeBranch(nn.Module):
    """A branch whose value nobody reads, only its batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.dead, self.live = conv(3, 9), conv(3, 2)

    def forward(self, x):
        unused = F.relu(self.dead(x))
        return self.live(x).view(unused.size(0), -1)


def test_dead_branches_are_dropped_with_their_weights():
    program = lower(WithShapeBranch().eval(), SHAPE)
    assert [op.name for op in program.ops] == ["live", "view"]
    assert set(program.tensors) == {"live.weight", "live.bias"}


class Names(nn.Module):
    """Modules named as functions are, and as the program's input is."""

    def __init__(self) -> None:
        super().__init__()
        self.add, self.input = nn.ReLU(), conv(3, 3)

    def forward(self, x):
        return self.add(self.input(x) + x) + x


def test_names_are_unique_and_sites_keep_theirs():
    model = Names().eval()
    program = lower(model, SHAPE)
    assert [(op.name, op.kind) for op in program.ops] == [
        ("input_1", "conv2d"),
        ("add_1", "add"),
        ("add", "relu"),
        ("add_2", "add"),
    ]
    assert gap(model, program, torch.randn(2, *SHAPE)) < 1e-6


def test_activations_carry_their_patches():
    patches = [(1, 1), (0, 0), (2, 3), (8, 8)]
    program = lower(Chain(conv(3, 4), BlockReLU(patches), F.relu, nn.ReLU6(), BlockReLU(patches, 6.0)), SHAPE)
    relus = [op for op in program.ops if isinstance(op, Relu)]
    assert [(op.patches, op.upper) for op in relus] == [
        (tuple(patches), None),
        (((1, 1),) * 4, None),
        (((1, 1),) * 4, 6.0),
        (tuple(patches), 6.0),
    ]
    assert relus[0].tiles == (64, 0, 4 * 3, 1)
    assert [op.drelus for op in relus] == [77, 256, 512, 154]


def test_lowering_takes_eval_mode_and_leaves_the_model_alone():
    model = TinyResNet().train()
    program = lower(model, SHAPE)
    assert model.training
    assert isinstance(program, Program)
    assert gap(model.eval(), program, torch.randn(2, *SHAPE)) < 1e-5
