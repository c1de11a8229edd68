"""Train the embedded demo network on the full Fashion-MNIST training set.

    OMP_WAIT_POLICY=passive python benchmarks/train_demo.py      # about 20 minutes on 2 cores

(The passive policy matters only where other programs want the cores: threads that spin then cost a factor.)

The checkpoint is the exponential moving average of the weights after the last epoch, with no choice among
epochs; the validation split only watches. The test split is read once, after training. Writes the weights to
src/tightrope/assets/demo.safetensors (every few epochs too) and the figures to
benchmarks/results/train_demo.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy

from tightrope.data.arrays import Arrays
from tightrope.data.base import Split
from tightrope.data.sources import fashion_mnist
from tightrope.models.resnet import demo_shape

HERE = Path(__file__).parent
WEIGHTS = HERE.parent / "src" / "tightrope" / "assets" / "demo.safetensors"
RESULT = HERE / "results" / "train_demo.json"


def accuracy(net: nn.Module, data: Arrays, split: Split) -> float:
    """Share of `split` that `net` classifies correctly, in float32."""
    net.eval()
    with torch.inference_mode():
        hits = sum(int((net(x).argmax(1) == y).sum()) for x, y in data.batches(split, 500))
    return hits / data.size(split)


def save(net: nn.Module, data: Arrays, facts: dict[str, str]) -> None:
    """Write the weights under a temporary name, then rename, so that readers never see half a file."""
    numbers = {
        "mean": json.dumps(data.mean),
        "std": json.dumps(data.std),
        "classes": json.dumps(data.classes),
    }
    tensors = {name: value.contiguous() for name, value in net.state_dict().items()}
    save_file(tensors, WEIGHTS.with_suffix(".part"), metadata=numbers | facts)
    WEIGHTS.with_suffix(".part").chmod(0o644)
    os.replace(WEIGHTS.with_suffix(".part"), WEIGHTS)


def train(
    data: Arrays, epochs: int, batch_size: int, learning_rate: float, decay: float, seed: int
) -> nn.Module:
    """SGD with Nesterov momentum under a one-cycle schedule; returns the moving average of the weights."""
    torch.manual_seed(seed)
    net = demo_shape(len(data.classes), data.input_shape[0]).to(memory_format=torch.channels_last)
    average = copy.deepcopy(net)
    optimizer = torch.optim.SGD(
        net.parameters(), lr=learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    steps = epochs * -(-data.size("train") // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.2)
    averaged = [v for v in average.state_dict().values() if v.is_floating_point()]
    values = [v for v in net.state_dict().values() if v.is_floating_point()]
    for epoch in range(epochs):
        start = time.perf_counter()
        net.train()
        for x, y in data.batches("train", batch_size, shuffle=True, seed=seed * 10_000 + epoch, augment=True):
            with torch.autocast("cpu", torch.bfloat16):
                loss = cross_entropy(
                    net(x.contiguous(memory_format=torch.channels_last)), y, label_smoothing=0.05
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            torch._foreach_lerp_(averaged, values, 1 - decay)
        if epoch % 4 == 3:
            valid = accuracy(average, data, "validation")
            save(
                average,
                data,
                {"epochs": str(epoch + 1), "seed": str(seed), "validation_accuracy": str(valid)},
            )
            print(f"epoch {epoch + 1:3d}  loss {loss.item():.3f}  validation {valid:.4f}  ", end="")
            print(f"{time.perf_counter() - start:.0f} s/epoch", flush=True)
    return average


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=44)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=0.2)
    parser.add_argument("--decay", type=float, default=0.998, help="of the moving average, per step")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = fashion_mnist(None, None, 0)
    start = time.perf_counter()
    net = train(data, args.epochs, args.batch_size, args.learning_rate, args.decay, args.seed)
    seconds = time.perf_counter() - start
    valid = accuracy(net, data, "validation")
    test = accuracy(net, data, "test")
    save(
        net,
        data,
        {
            "epochs": str(args.epochs),
            "seed": str(args.seed),
            "validation_accuracy": str(valid),
            "test_accuracy": str(test),
        },
    )
    result = {
        **vars(args),
        "validation_accuracy": valid,
        "test_accuracy": test,
        "train_images": data.size("train"),
        "validation_images": data.size("validation"),
        "test_images": data.size("test"),
        "parameters": sum(p.numel() for p in net.parameters()),
        "train_s": round(seconds),
        "command": "OMP_WAIT_POLICY=passive python benchmarks/train_demo.py",
        "host": {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"validation {valid:.4f}  test {test:.4f}  {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
