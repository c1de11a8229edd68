"""Train a residual network on Fashion-MNIST, choose its polynomials by levels, and fine-tune them.

    python benchmarks/train_paf.py                       # small: about 10 minutes of one core
    python benchmarks/train_paf.py --network resnet20    # an hour; `bench_ckks_bootstrap.py` encrypts it

The bundle is what `tightrope run runs/paf-small --runtime ckks` encrypts. The validation split only watches;
the test split is read once, at the end.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from _small_residual import RECIPE, SPEC, trained
from tightrope import models, pipeline
from tightrope.data import load
from tightrope.recipe import Recipe


@dataclass(frozen=True)
class Network:
    """What to load, how to train it with ReLUs, in how many levels, how to train it with which of them."""

    spec: str
    base: Recipe
    budget: str
    recipe: Recipe
    polynomials: str = "*"


QUICK = replace(RECIPE, epochs=4, precision="bf16-mixed")
NETWORKS = {
    "small": Network(SPEC, RECIPE, "ckks_levels<=15", Recipe(epochs=10, batch_size=128)),
    "resnet20": Network(
        "resnet20", QUICK, "ckks_levels<=37", Recipe(epochs=2, batch_size=128), "degree [12]"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="small")
    parser.add_argument("--out", type=Path, help="default: runs/paf-NETWORK")
    parser.add_argument("--weights", type=Path, help="default: runs/NETWORK.safetensors")
    parser.add_argument("--budget")
    parser.add_argument("--polynomials", help="which may be chosen; one makes a uniform plan")
    parser.add_argument("--epochs", type=float)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    chosen, data = NETWORKS[given.network], load("fashion-mnist")
    weights = given.weights or Path(f"runs/{given.network}.safetensors")
    shape = {"num_classes": len(data.classes), "in_channels": data.input_shape[0]}
    trained(models.resolve(chosen.spec, **shape), data, weights, chosen.base)
    bundle = pipeline.search(
        model=chosen.spec,
        weights=weights,
        data="fashion-mnist",
        method="paf",
        budget=given.budget or chosen.budget,
        config={"samples": 512, "polynomials": given.polynomials or chosen.polynomials},
        out=given.out or Path(f"runs/paf-{given.network}"),
        overwrite=True,
    )
    plan = bundle.plan()
    for site, choice in plan.choices.items():
        print(site, choice["polynomial"])
    print(f"{plan.predicted.ckks_levels:g} levels", flush=True)
    recipe = replace(chosen.recipe, epochs=given.epochs or chosen.recipe.epochs)
    print(pipeline.train(bundle, recipe, resume=False, log=print) | pipeline.test(bundle))


if __name__ == "__main__":
    main()
