"""Architecture strings and their networks, against the published ones and against timm."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from networks import gap, settle
from published import BINAS, COUNTS
from tightrope import models
from tightrope.errors import InputError
from tightrope.lower import lower
from tightrope.models.arch import ACTIVATIONS, TYPES, Architecture, Block
from tightrope.models.mobilenet import divisible, mobilenet
from tightrope.program import base_cost

WIDENED = (  # the sample in BINAS's README: 1.2 times as wide, other options, another order
    "[['ds_r1_k3_s1_e1_c24_nre'], ['ir_r1_k5_s2_e3_c32_nre_se0.25', 'ir_r1_k5_s1_e6_c32_nre_se0.25'], "
    "['cn_r1_k1_s1_c1152']]"
)
TIMM_NAMES = {"re": "relu", "r6": "relu6", "hs": "hard_swish", "sw": "silu"}


@st.composite
def blocks(draw: st.DrawFn, first: bool) -> Block:
    kind = draw(st.sampled_from(TYPES))
    expands = kind in ("ir", "er")
    return Block(
        kind=kind,
        kernel=draw(st.sampled_from((1, 3, 5, 7))),
        stride=draw(st.sampled_from((1, 2))) if first else 1,
        channels=draw(st.integers(1, 9)) * 8,
        expansion=draw(st.sampled_from((1, 2.5, 3, 6))) if expands else 1,
        se=0.0 if kind == "cn" else draw(st.sampled_from((0, 0.25, 0.0625))),
        activation=draw(st.sampled_from((None, *ACTIVATIONS))),
        skip=draw(st.booleans()),
        repeats=draw(st.integers(1, 2)),
    )


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    stages = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3))
    return Architecture(
        tuple(tuple(draw(blocks(k == 0)) for k in range(n + 1)) for n in stages),
        stem=draw(st.integers(1, 64)),
        stride=draw(st.sampled_from((1, 2))),
        head=draw(st.integers(1, 64)),
        act=draw(st.sampled_from(ACTIVATIONS)),
    )


@given(architectures())
def test_round_trip(arch):
    assert Architecture.parse(str(arch)) == arch


@given(architectures(), st.randoms(use_true_random=False))
def test_the_order_of_options_and_white_space_do_not_matter(arch, random):
    stages = []
    for stage in arch.stages:
        words = []
        for block in stage:
            kind, *options = str(block).split("_")
            random.shuffle(options)
            words.append('"' + "_".join([kind, *options]) + '"')
        stages.append("[ " + " ,".join(words) + "]")
    rest = str(arch).rpartition("]")[2]
    assert Architecture.parse(" [" + " , ".join(stages) + ",]" + rest) == arch


@given(st.text(alphabet="[]'\", _dsairecnk0123456789.=", max_size=80))
def test_any_text_is_an_architecture_or_an_input_error(text):
    try:
        arch = Architecture.parse(text)
    except InputError:
        return
    assert Architecture.parse(str(arch)) == arch


@given(st.sampled_from(sorted(BINAS)), st.data())
def test_one_changed_character_is_refused_or_read_as_written(name, data):
    text = BINAS[name]
    at = data.draw(st.integers(0, len(text) - 1))
    new = data.draw(st.characters(codec="utf-8"))
    changed = text[:at] + new + text[at + 1 :]
    try:
        arch = Architecture.parse(changed)
    except InputError:
        return
    assert Architecture.parse(str(arch)) == arch


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot read"),
        ("[[]]", "cannot read"),
        ("[['cn_r1_k1_s1_c8']", "cannot read"),
        ("[['xx_r1_k1_s1_c8']]", "'xx'"),
        ("[['cn_r1_k1_s1_c8'], ['ir_r1_k3_s1_c8']]", "stage 1, block 0"),
        ("[['ir_r1_k3_s1_c8_e3'], ['ir_k3_s1_e3_c8']]", r"\['r'\]"),
        ("[['ir_r1_k3_s1_e3_c8_nrelu']]", "nhs"),
        ("[['ir_r1_k4_s1_e3_c8']]", "odd"),
        ("[['ir_r1_k3_s3_e3_c8']]", "1 or 2"),
        ("[['ir_r1_k3_s1_e3_c8', 'ir_r1_k3_s2_e3_c8']]", "first block"),
        ("[['ir_r1_k3_s1_e3_c8_k5']]", "twice"),
        ("[['ir_r1_k3_s1_e3_c8_se2']]", "up to 1"),
        ("[['ir_r1_k3_s1_e0_c8']]", "above 0"),
        ("[['ds_r1_k3_s1_e3_c8']]", "does not expand"),
        ("[['ir_r1_k3_s1_e3_c8_cc4']]", "twice"),
        ("[['ir_r1_k3_s1_e3_c8_a1']]", "'a1'"),
        ("[['ir_r1_k3.5_s1_e3_c8']]", "3.5"),
        ("[['ir_r1_k3_s1_e3_c99999999']]", "65536"),
        ("[['cn_r1_k1_s1_c8']] stem=0", "stem"),
        ("[['cn_r1_k1_s1_c8']] stems=8", "stem"),
        ("[['cn_r1_k1_s1_c8']] act=xx", "hs"),
    ],
)
def test_errors_name_the_place_and_the_remedy(text, words):
    with pytest.raises(InputError, match=words):
        Architecture.parse(text)


@pytest.mark.parametrize("text", [*BINAS.values(), WIDENED])
def test_published_strings_print_as_they_are(text):
    assert str(Architecture.parse(text)) == text


def measure(arch: Architecture) -> tuple[int, float]:
    net = mobilenet(arch).eval()
    macs = sum(base_cost(op).macs for op in lower(net, (3, 224, 224)).ops)
    return sum(p.numel() for p in net.parameters()), macs


@pytest.mark.parametrize("name", COUNTS)
def test_published_counts(name):
    """Millions of parameters and MACs as counted independently for the research of this method."""
    parameters, macs = measure(Architecture.parse(BINAS[name]))
    assert (round(parameters / 1e6, 2), round(macs / 1e6)) == COUNTS[name]


@settings(max_examples=20)
@given(architectures())
def test_every_architecture_is_a_network_that_can_be_lowered(arch):
    net = settle(mobilenet(arch, num_classes=3, in_channels=2))
    assert gap(net, lower(net, (2, 9, 9)), torch.randn(2, 2, 9, 9)) < 1e-3


@given(st.floats(0.01, 5000))
def test_widths_are_multiples_of_eight_near_what_was_asked(width):
    made = divisible(width)
    assert made % 8 == 0 and made >= 0.9 * width
    assert made - width <= 8


def test_resolve_builds_a_string_with_the_sizes_of_the_data():
    net = models.resolve(f"arch:{BINAS['A']}", num_classes=7, in_channels=1)
    assert net(torch.zeros(1, 1, 32, 32)).shape == (1, 7)
    with pytest.raises(InputError, match="cannot read"):
        models.resolve("arch:[[")


@pytest.mark.vision
@pytest.mark.parametrize("letter", "abcdef")
def test_hardcorenas_of_timm(letter, monkeypatch):
    """timm's own strings give networks with timm's tensors, and with its weights its outputs."""
    from timm.models import hardcorenas

    given = {}
    real = hardcorenas.decode_arch_def
    monkeypatch.setattr(hardcorenas, "decode_arch_def", lambda arch: real(given.setdefault("arch", arch)))
    theirs = getattr(hardcorenas, f"hardcorenas_{letter}")().eval()
    ours = mobilenet(Architecture.parse(str(given["arch"]))).eval()
    state = theirs.state_dict()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in state.items()}
    ours.load_state_dict(state)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.vision
@settings(max_examples=25)
@given(architectures())
def test_shapes_and_outputs_of_any_architecture_are_those_of_timm(arch):
    """Where timm knows the block: it takes no noskip for `dsa` and `cn`, which have no shortcut anyway."""
    from functools import partial

    from timm.models._efficientnet_blocks import SqueezeExcite
    from timm.models._efficientnet_builder import decode_arch_def, resolve_act_layer, round_channels
    from timm.models.mobilenetv3 import MobileNetV3

    stages = [[str(block) for block in stage] for stage in arch.stages]
    theirs = MobileNetV3(
        decode_arch_def(stages),
        num_classes=3,
        in_chans=3,
        stem_size=arch.stem,
        fix_stem=True,
        num_features=arch.head,
        act_layer=resolve_act_layer({"act_layer": TIMM_NAMES[arch.act]}),
        se_layer=partial(
            SqueezeExcite,
            gate_layer="hard_sigmoid",
            force_act_layer=torch.nn.ReLU,
            rd_round_fn=round_channels,
        ),
    ).eval()
    theirs.conv_stem.stride = (arch.stride,) * 2
    ours = mobilenet(arch, num_classes=3).eval()
    state = theirs.state_dict()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in state.items()}
    ours.load_state_dict(state)
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
