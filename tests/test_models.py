"""Networks by name: shapes, published sizes, the trained demo, weights files, errors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from tightrope import data
from tightrope.errors import InputError
from tightrope.models import DEMO_WEIGHTS, NAMES, located, resolve

INPUTS = {"demo": (1, 28, 28)}
TEN = "from torch import nn\ndef ten(num_classes=10): return nn.Linear(4, num_classes)\n"


@pytest.mark.parametrize("name", NAMES)
def test_networks_run_and_are_traceable(name):
    net = resolve(name)
    x = torch.randn(2, *INPUTS.get(name, (3, 32, 32)))
    assert not net.training
    with torch.inference_mode():
        expected = net(x)
        assert expected.shape == (2, 10)
        assert torch.equal(torch.fx.symbolic_trace(net)(x), expected)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        # He et al. 2016, table 6 (0.27 M, 0.46 M), exact in github.com/akamaster/pytorch_resnet_cifar10;
        # those have padded shortcuts, ours two 1x1 convolutions with batch-norm more.
        ("resnet20", 269_722 + (16 * 32 + 64) + (32 * 64 + 128)),
        ("resnet32", 464_154 + (16 * 32 + 64) + (32 * 64 + 128)),
        # github.com/kuangliu/pytorch-cifar; its VGGs have biases that batch-norm cancels.
        ("resnet18", 11_173_962),
        ("vgg16_bn", 14_728_266 - 4_224),
        ("vgg19_bn", 20_040_522 - 5_504),
    ],
)
def test_parameters_as_published(name, published):
    assert sum(p.numel() for p in resolve(name).parameters()) == published


def test_classes_and_channels_are_free():
    assert resolve("resnet8", num_classes=7, in_channels=1)(torch.randn(1, 1, 28, 28)).shape == (1, 7)
    with pytest.raises(InputError, match="num_classes must be positive"):
        resolve("resnet8", num_classes=0)


def test_demo_classifies_the_embedded_test_images():
    net, embedded = resolve("demo"), data.load("embedded")
    with torch.inference_mode():
        hits = sum(int((net(x).argmax(1) == y).sum()) for x, y in embedded.batches("test", 250))
    assert hits / embedded.size("test") >= 0.91


def test_demo_weights_say_what_they_expect():
    embedded = data.load("embedded")
    with safe_open(DEMO_WEIGHTS, "pt") as file:
        facts = file.metadata()
    assert tuple(json.loads(facts["mean"])) == embedded.mean
    assert tuple(json.loads(facts["std"])) == embedded.std
    assert tuple(json.loads(facts["classes"])) == embedded.classes


def test_demo_has_one_shape():
    with pytest.raises(InputError, match="grey images"):
        resolve("demo", num_classes=100)


@pytest.mark.parametrize(
    ("spec", "near"), [("resnet21", "resnet20"), ("vgg16", "vgg16_bn"), ("Demo", "demo"), ("", "demo")]
)
def test_unknown_names_get_near_ones(spec, near):
    with pytest.raises(InputError, match=rf"unknown network(.|\n)*try(.|\n)*{near}"):
        resolve(spec)


# --- weights ----------------------------------------------------------------------------------------------


def test_weights_come_back(tmp_path):
    first, second = resolve("resnet8"), resolve("resnet8")
    save_file(first.state_dict(), tmp_path / "w.safetensors")
    x = torch.randn(1, 3, 32, 32)
    assert not torch.equal(first(x), second(x))
    assert torch.equal(resolve("resnet8", weights=tmp_path / "w.safetensors")(x), first(x))


def spoil(state: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    spoilt = {
        "missing": {k: v for k, v in state.items() if k != "fc.bias"},
        "foreign": state | {"fc.extra": torch.zeros(1)},
        "shape": state | {"fc.bias": torch.zeros(11)},
        "type": state | {"fc.bias": torch.zeros(10, dtype=torch.int64)},
        "nan": state | {"fc.bias": torch.full((10,), torch.nan)},
    }
    return spoilt[how]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"1 missing: fc\.bias"),
        ("foreign", r"not in the network: fc\.extra"),
        ("shape", r"fc\.bias \[11\], network \[10\]"),
        ("type", r"fc\.bias"),
        ("nan", "infinities or NaN"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, how, message):
    save_file(spoil(resolve("resnet8").state_dict(), how), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=message):
        resolve("resnet8", weights=tmp_path / "w.safetensors")


def test_weights_files_that_are_none(tmp_path):
    whole = DEMO_WEIGHTS.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-1])
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "w.pth").write_bytes(whole)
    for name, message in {
        "cut.safetensors": "corrupt",
        "text.safetensors": "corrupt",
        "w.pth": "safetensors files only",
        "none.safetensors": "no such weights",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            resolve("demo", weights=tmp_path / name)
        assert name in str(caught.value)


# --- a function in a file ---------------------------------------------------------------------------------


def test_function_of_a_file(tmp_path):
    (tmp_path / "net.py").write_text(TEN)
    net = resolve(f"{tmp_path}/net.py:ten", num_classes=3)
    assert isinstance(net, nn.Linear) and net.out_features == 3


@pytest.mark.parametrize(
    ("source", "spec", "message"),
    [
        (TEN, "other.py:ten", "no such Python file"),
        (TEN, "net.py", "which function"),
        (TEN, "net.py:tem", "near: ten"),
        ("def ten(): return 3\n", "net.py:ten", "returned no torch.nn.Module"),
        ("def ten(): return 1 / 0\n", "net.py:ten", "ZeroDivisionError"),
        ("def ten(:\n", "net.py:ten", "SyntaxError"),
        ("import no_such_package\n", "net.py:ten", "no_such_package"),
    ],
)
def test_files_that_give_no_network(tmp_path, source, spec, message):
    (tmp_path / "net.py").write_text(source)
    with pytest.raises(InputError, match=message):
        resolve(f"{tmp_path}/{spec}")


def test_a_function_gets_what_it_takes_and_no_more(tmp_path):
    (tmp_path / "net.py").write_text(TEN)
    net = resolve(f"{tmp_path}/net.py:ten", in_channels=1, num_classes=7)
    assert net.out_features == 7


# --- libraries --------------------------------------------------------------------------------------------


def test_the_path_of_a_file_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert located("nets/net.py:make") == f"{tmp_path}/nets/net.py:make"
    assert located(f"{tmp_path}/net.py:make") == f"{tmp_path}/net.py:make"
    for name in ("demo", "resnet18", "timm:resnet18", "torchvision:resnet18.py:x", "nonsense"):
        assert located(name) == name


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_missing_library_says_how_to_install(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)  # makes the import fail
    monkeypatch.setitem(sys.modules, f"{library}.models", None)
    with pytest.raises(InputError, match=r"not installed(.|\n)*pip install 'tightrope\[vision\]'"):
        resolve(f"{library}:resnet18")


@pytest.mark.vision
@pytest.mark.parametrize("spec", ["torchvision:resnet18", "timm:regnetx_002"])
def test_networks_from_elsewhere_load_beside_the_torch_that_is_there(spec):
    """In an interpreter of its own: here, conftest.py has made torchvision load."""
    pytest.importorskip("timm")
    code = f"from tightrope.models import resolve; print(type(resolve({spec!r})).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("ResNet", "RegNet")


def test_torchvision():
    pytest.importorskip("torchvision")
    assert resolve("torchvision:mobilenet_v2", num_classes=7)(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    with pytest.raises(InputError, match="near: resnet18"):
        resolve("torchvision:resnet_18")
    with pytest.raises(InputError, match="read 3 channels"):
        resolve("torchvision:resnet18", in_channels=1)


@pytest.mark.vision
def test_timm():
    pytest.importorskip("timm")
    net = resolve("timm:regnetx_002", num_classes=7, in_channels=1)
    assert net(torch.randn(1, 1, 64, 64)).shape == (1, 7)
    with pytest.raises(InputError, match="regnetx_002"):
        resolve("timm:regnetx_0002")
    with pytest.raises(InputError, match=r"timm:resnet18\.nonsense"):
        resolve("timm:resnet18.nonsense")
