"""Train the small residual network on Fashion-MNIST, choose its polynomials by levels, and fine-tune them.

    python benchmarks/train_paf.py --out runs/paf        # about 3 minutes of one core

The bundle is what `tightrope run runs/paf --runtime ckks` encrypts. The validation split only watches; the
test split is read once, at the end.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from _small_residual import SPEC, trained
from tightrope import pipeline
from tightrope.data import load
from tightrope.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/paf"))
    parser.add_argument("--weights", type=Path, default=Path("runs/small-residual.safetensors"))
    parser.add_argument("--budget", default="ckks_levels<=17")
    parser.add_argument("--epochs", type=float, default=6)
    parser.add_argument("--spec", default=SPEC, help="where the bundle finds the network")
    given = parser.parse_args()
    torch.set_num_threads(1)
    trained(load("fashion-mnist"), given.weights)
    bundle = pipeline.search(
        model=given.spec,
        weights=given.weights,
        data="fashion-mnist",
        method="paf",
        budget=given.budget,
        config={"samples": 512},
        out=given.out,
        overwrite=True,
    )
    for site, choice in bundle.plan().choices.items():
        print(site, choice["polynomial"])
    recipe = Recipe(epochs=given.epochs, batch_size=128)
    print(pipeline.train(bundle, recipe, resume=False, log=print) | pipeline.test(bundle))


if __name__ == "__main__":
    main()
