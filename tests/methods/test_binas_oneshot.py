"""One-shot training: it learns, its losses are the published ones, and it resumes exactly."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from methods.binas_toys import SPACE, random_supernet, textures
from stripes import QUICK, Record, same, without_time
from tightrope.errors import BundleError, InputError
from tightrope.evaluate import accuracy
from tightrope.hints import Hints, Watch, mean_square
from tightrope.methods.binas.extract import extract, inherit
from tightrope.methods.binas.oneshot import (
    HEAVIEST_FILE,
    OneShot,
    heaviest_network,
    load,
    load_heaviest,
    save,
    train,
    watched,
)
from tightrope.methods.binas.paths import same_path
from tightrope.methods.binas.ranking import importance, reorder
from tightrope.methods.binas.space import PRESETS
from tightrope.methods.binas.supernet import Supernet
from tightrope.models.mobilenet import InvertedResidual

PHASE = replace(QUICK, label=1.0, smoothing=0.1, distill=0.0, hints=0.0, epochs=2)
SETTINGS = OneShot(
    heaviest=PHASE, elastic=replace(PHASE, distill=1.0, temperature=1.0, hints=0.02), ranking=0.5, largest=0.0
)
LONGER = replace(SETTINGS, elastic=replace(SETTINGS.elastic, epochs=3))


def settled(seed: int = 0) -> nn.Module:
    """A heaviest network whose batch-norm does something, in float64."""
    net = heaviest_network(SPACE, seed).double()
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.weight.data.uniform_(0.5, 1.5)
    return net


def test_a_share_for_the_largest_network_is_part_of_the_run(tmp_path: Path) -> None:
    settings = replace(SETTINGS, largest=0.25)
    supernet = train(SPACE, textures(), settings, folder=tmp_path)
    assert supernet.drawn is None and same(train(SPACE, textures(), settings, folder=tmp_path), supernet)
    with pytest.raises(BundleError, match="largest"):
        train(SPACE, textures(), SETTINGS, folder=tmp_path)
    (tmp_path / "supernet.safetensors").unlink()
    assert not same(train(SPACE, textures(), SETTINGS, folder=tmp_path), supernet)


@pytest.mark.parametrize("norms", ["shared", "path"])
def test_small_and_large_networks_learn_together(tmp_path: Path, norms: Any) -> None:
    records = list[Record]()
    settings = replace(LONGER, norms=norms)
    supernet = train(SPACE, textures(train=320), settings, folder=tmp_path, log=records.append)
    phases = ["heaviest"] * 2 + ["elastic"] * 3
    assert [(r["phase"], r["epoch"]) for r in records] == list(zip(phases, (1, 2, 1, 2, 3), strict=True))
    assert records[1]["validation_accuracy"] > 0.9
    assert records[-1]["loss"] < records[2]["loss"]
    assert records[-1]["validation_accuracy"] > 0.8  # of random networks
    for choice in (SPACE.smallest(), SPACE.largest()):
        assert accuracy(extract(supernet, choice), textures(train=320), "test") > 0.7
    assert not any(module.training for module in supernet.modules())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "heaviest.safetensors", "supernet.safetensors",
    ]  # fmt: skip
    # Finished: only loaded, without a look at the data.
    unread = textures(train=320, at=lambda: pytest.fail("read"))
    assert same(train(SPACE, unread, settings, folder=tmp_path), supernet)
    assert same(load(tmp_path / "supernet.safetensors", SPACE), supernet)
    # The largest network is trained again where its file is gone, to the same weights.
    heaviest = load_heaviest(tmp_path / HEAVIEST_FILE, SPACE)
    (tmp_path / HEAVIEST_FILE).unlink()
    with pytest.raises(InputError, match="no trained largest network"):
        load_heaviest(tmp_path / HEAVIEST_FILE, SPACE)
    train(SPACE, textures(train=320), settings, folder=tmp_path)
    assert same(load_heaviest(tmp_path / HEAVIEST_FILE, SPACE), heaviest)


@pytest.mark.parametrize("stop", [3, 12, 17, 23])  # heaviest; ranking; elastic, two epochs
def test_resumes_to_the_same_losses_and_weights(tmp_path: Path, stop: int) -> None:
    whole, parts = list[Record](), list[Record]()
    expected = train(SPACE, textures(), SETTINGS, folder=tmp_path / "whole", log=whole.append)
    count = 0

    def interrupt() -> None:
        nonlocal count
        count += 1
        if count == stop + 1:
            raise KeyboardInterrupt

    folder = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        train(SPACE, textures(at=interrupt), SETTINGS, folder=folder, log=parts.append)
    if stop == 23:  # in the elastic phase, whose batches were drawn otherwise
        with pytest.raises(BundleError, match="another run"):
            train(SPACE, textures(), replace(SETTINGS, largest=0.25), folder=folder)
    torch.manual_seed(99)
    supernet = train(SPACE, textures(), SETTINGS, folder=folder, log=parts.append)
    assert without_time(parts) == without_time(whole)
    assert same(supernet, expected)


def test_mixed_precision_trains_too(tmp_path: Path) -> None:
    phases = [replace(p, precision="bf16-mixed", epochs=1) for p in (SETTINGS.heaviest, SETTINGS.elastic)]
    records = list[Record]()
    settings = replace(SETTINGS, heaviest=phases[0], elastic=phases[1])
    supernet = train(SPACE, textures(), settings, folder=tmp_path, log=records.append)
    assert [0 < r["loss"] < 10 for r in records] == [True, True]
    assert all(p.dtype == torch.float32 for p in supernet.parameters())


def test_nothing_is_lost_on_the_heaviest_path() -> None:
    """Against its teacher the new supernet's own largest network has neither kind of loss."""
    heaviest = settled()
    supernet = inherit(heaviest, SPACE).double().eval()
    hints = Hints(supernet, heaviest, Watch(watched(SPACE), mean_square))
    assert hints.names == ["act1", "blocks.1", "blocks.2"]
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        outputs, soft = supernet(x, same_path(SPACE, SPACE.largest(), 4)), heaviest(x)
    assert float(hints.loss()) < 1e-12
    torch.testing.assert_close(outputs, soft)


def test_the_loss_of_maps_is_the_sum_of_mean_squares_over_fifty(monkeypatch: pytest.MonkeyPatch) -> None:
    from tightrope.methods.binas import oneshot

    seen = {}

    def keep(model: nn.Module, data: Any, **kwargs: Any) -> nn.Module:
        seen.update(kwargs)
        raise KeyboardInterrupt

    heaviest, supernet = heaviest_network(SPACE), random_supernet().float()
    monkeypatch.setattr(oneshot, "_heaviest", lambda *args: heaviest)
    monkeypatch.setattr(oneshot, "finetune", keep)
    with pytest.raises(KeyboardInterrupt):
        train(SPACE, textures(), OneShot(), folder=Path("unused"))
    assert seen["teacher"] is heaviest
    hints = Hints(supernet, heaviest, seen["watch"])
    maps: dict[str, list[torch.Tensor]] = {}
    for net in (supernet, heaviest):
        for name in ("act1", "blocks.1", "blocks.2"):
            net.get_submodule(name).register_forward_hook(
                lambda m, args, out, name=name: maps.setdefault(name, []).append(out)
            )
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        supernet(x), heaviest(x)
    expected = sum(F.mse_loss(a, b) for a, b in maps.values()) / 50
    torch.testing.assert_close(seen["recipe"].hints * hints.loss(), expected)
    assert (seen["recipe"].label, seen["recipe"].distill, seen["recipe"].temperature) == (1, 1, 1)


def test_ranked_channels_compute_the_same_and_come_in_order() -> None:
    net = settled()
    x, y = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    scores = importance(net, batches)
    ranked = reorder(net, scores)
    torch.testing.assert_close(ranked(x), net(x))
    assert not same(ranked, net)
    again = importance(ranked, batches)
    blocks = [name for name, m in net.named_modules() if isinstance(m, InvertedResidual)]
    assert len(blocks) == 5
    for name in blocks:
        parts = ("conv_pw", "conv_dw", "se.conv_expand")
        inner = sum(again[f"{name}.{part}"] for part in parts)
        for order in (inner, again[f"{name}.se.conv_reduce"]):
            assert (order.diff() <= 1e-9).all() and order[0] > order[-1]


def test_importance_by_its_definition() -> None:
    net = settled()
    x, y = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    found = importance(net, [(x[:2], y[:2]), (x[2:], y[2:])])["blocks.1.0.conv_dw"]
    weight = net.get_parameter("blocks.1.0.conv_dw.weight")
    expected = torch.zeros(len(weight), dtype=torch.float64)
    for part in (slice(0, 2), slice(2, 6)):
        net.zero_grad()
        F.cross_entropy(net(x[part]), y[part]).backward()
        expected += (weight * weight.grad).abs().flatten(1).sum(1).detach()
    torch.testing.assert_close(found, expected)


def test_smaller_kernels_start_as_the_middle_of_the_largest() -> None:
    heaviest = heaviest_network(SPACE)
    block = inherit(heaviest, SPACE).get_submodule("blocks.1.0")
    assert torch.equal(
        block.conv_dw[0].weight, heaviest.get_parameter("blocks.1.0.conv_dw.weight")[..., 1:4, 1:4]
    )


def test_what_cannot_be_trained_or_loaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not fit the space fashion"):
        train(PRESETS["fashion"], textures(), SETTINGS, folder=tmp_path)
    with pytest.raises(InputError, match="no supernet"):
        load(tmp_path / "none.safetensors", SPACE)
    for share in (0, 1.5):
        with pytest.raises(InputError, match="rank"):
            OneShot(ranking=share)
    for share in (-0.1, 1):
        with pytest.raises(InputError, match="largest"):
            OneShot(largest=share)
    supernet = Supernet(SPACE, "shared")
    save(supernet, tmp_path / "own.safetensors")
    assert load(tmp_path / "own.safetensors", SPACE).norms == "shared"
    with pytest.raises(BundleError, match="another run"):
        load(tmp_path / "own.safetensors", replace(SPACE, head=24))
    with pytest.raises(BundleError, match="another run"):
        train(SPACE, textures(), SETTINGS, folder=tmp_path / "a") and train(
            SPACE, textures(), replace(SETTINGS, norms="shared"), folder=tmp_path / "a"
        )
    whole = (tmp_path / "own.safetensors").read_bytes()
    (tmp_path / "own.safetensors").write_bytes(whole[:-100])
    with pytest.raises(BundleError, match="damaged"):
        load(tmp_path / "own.safetensors", SPACE)


SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from methods.test_binas_oneshot import SETTINGS, SPACE, textures
from tightrope.methods.binas.oneshot import train
two = replace(SETTINGS.heaviest, devices=2, epochs=1), replace(SETTINGS.elastic, devices=2, epochs=1)
train(SPACE, textures(), replace(SETTINGS, heaviest=two[0], elastic=two[1]), folder=Path(sys.argv[2]))
"""


@pytest.mark.slow
def test_two_processes_train_one_supernet(tmp_path: Path) -> None:
    """Also where a norm has no sample in one of them; the folder holds what both agreed on."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-W", "error::UserWarning", str(script), str(Path(__file__).parents[1])]
    done = subprocess.run([*command, str(tmp_path / "run")], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "heaviest.safetensors", "supernet.safetensors",
    ]  # fmt: skip
    state = load_file(tmp_path / "run" / "supernet.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in state.values() if tensor.is_floating_point())
    assert json.dumps(sorted(state)) == json.dumps(sorted(Supernet(SPACE).state_dict()))
