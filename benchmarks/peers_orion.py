"""In the virtual environment of orion-v2-compiler: the small residual network with its activations.

`bench_ckks_orion.py` calls this with one JSON line on standard input: `train` trains the network with x^2,
the cheapest of its activations, and compiles it; `compile` says what another activation takes; `serve`
evaluates some images. It answers with one JSON line.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.stdout, answers = sys.stderr, sys.stdout  # progress bars must not get between the answers


def network(activation: str) -> torch.nn.Module:
    """That of `_small_residual.small`, of the peer's layers."""
    import orion_compiler.nn as on

    make = {"x^2": on.Quad, "SiLU, degree 7": lambda: on.SiLU(degree=7), "SiLU, degree 31": on.SiLU}[
        activation
    ]

    class Block(on.Module):  # type: ignore[misc]
        def __init__(self, before: int, width: int, stride: int) -> None:
            super().__init__()
            self.conv1 = on.Conv2d(before, width, 3, stride, 1, bias=False)
            self.bn1, self.act1 = on.BatchNorm2d(width), make()
            self.conv2 = on.Conv2d(width, width, 3, 1, 1, bias=False)
            self.bn2, self.act2, self.add = on.BatchNorm2d(width), make(), on.Add()
            self.shortcut = on.Conv2d(before, width, 1, stride, 0, bias=False)
            self.bn3 = on.BatchNorm2d(width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
            return self.act2(self.add(y, self.bn3(self.shortcut(x))))

    class Net(on.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = on.Conv2d(1, 8, 3, 1, 1, bias=False)
            self.bn1, self.act = on.BatchNorm2d(8), make()
            self.first, self.second = Block(8, 8, 2), Block(8, 16, 2)
            self.pool, self.flat, self.fc = on.AdaptiveAvgPool2d((1, 1)), on.Flatten(), on.Linear(16, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.second(self.first(self.act(self.bn1(self.conv1(x)))))
            return self.fc(self.flat(self.pool(x)))

    return Net()


def compiled(net: torch.nn.Module, x: torch.Tensor, library: dict[str, Any]) -> Any:
    from orion_compiler import CKKSParams, Compiler

    known = {k: v for k, v in library.items() if not k.startswith("b") or v is not None}
    known |= {"logq": tuple(known["logq"]), "logp": tuple(known["logp"])}
    compiler = Compiler(net, CKKSParams(**known))
    compiler.fit(x)  # one image: a batch would be packed together
    return compiler.compile()


def train(asked: dict[str, Any]) -> dict[str, Any]:
    from safetensors.torch import load_file

    from _small_residual import small
    from tightrope.data import load
    from tightrope.evaluate import accuracy
    from tightrope.finetune import finetune
    from tightrope.recipe import Recipe

    torch.manual_seed(0)
    data, teacher = load("fashion-mnist"), small(10, 1)
    teacher.load_state_dict(load_file(asked["weights"]))
    net = network("x^2").train()
    best = None
    for lr in (0.1, 0.02):  # the better on validation images; the test split is read once
        recipe = Recipe(epochs=asked["epochs"], batch_size=128, lr=lr, hints=0, channels_last=False)
        try:
            tuned = finetune(net, data, teacher=teacher.eval(), recipe=recipe)
        except Exception as error:  # it may diverge
            print(lr, error, file=sys.stderr)
            continue
        found = accuracy(tuned, data, "validation")
        print(lr, found, file=sys.stderr)
        best = max(best or (0.0, tuned), (found, tuned), key=lambda pair: pair[0])
    assert best is not None
    net = best[1].eval()
    x = next(iter(data.batches("validation", 1, limit=1)))[0]
    model = compiled(net, x, asked["library"])
    Path(asked["model"]).write_bytes(model.to_bytes())
    images = torch.cat([images for images, _ in data.batches("test", 100, limit=asked["images"])])
    with torch.no_grad():
        outputs = net(images[: asked["images"]])
    return {
        "levels": model.input_level,
        "galois_elements": sorted(model.manifest.galois_elements),
        "validation": best[0],
        "test": accuracy(net, data, "test"),
        "images": images[: asked["images"]].flatten(1).tolist(),
        "outputs": outputs.tolist(),
    }


def describe(asked: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    model = compiled(network(asked["activation"]).eval(), 0.3 * torch.randn(1, 1, 28, 28), asked["library"])
    return {"levels": model.input_level, "keys": len(model.manifest.galois_elements) + 1}


def serve(asked: dict[str, Any]) -> dict[str, Any]:
    """Its evaluator, on keys mapped from a file: its own constructor takes three times their size."""
    from orion_evaluator.model import Model

    from tightrope.runtimes.ckks.lattigo import _evaluator, _mapped

    parameters: Any = SimpleNamespace(library=lambda: asked["library"])
    times, results = [], []
    with Model.load(Path(asked["model"]).read_bytes()) as model, _mapped(Path(asked["keys"])) as keys:
        evaluator = _evaluator(parameters, keys, None)
        for name in asked["ciphertexts"]:
            start = time.process_time()
            results.append(evaluator.forward(model, [Path(name).read_bytes()]))
            times.append(time.process_time() - start)
    for name, parts in zip(asked["ciphertexts"], results, strict=True):
        Path(name + ".out").write_bytes(parts[0])
    return {"cpu_s": times, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


if __name__ == "__main__":
    torch.set_num_threads(1)
    line = json.loads(sys.stdin.readline())
    answer = {"train": train, "compile": describe, "serve": serve}[line["do"]](line)
    print(json.dumps(answer), file=answers, flush=True)
