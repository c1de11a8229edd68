"""Train a residual network on Fashion-MNIST, choose its polynomials by levels, and fine-tune them.

    python benchmarks/train_paf.py                       # small: about 10 minutes of one core
    python benchmarks/train_paf.py --network resnet20    # an hour; `bench_ckks_bootstrap.py` encrypts it

The bundle, of the first seed, is what `tightrope run runs/paf-small --runtime ckks` encrypts. The validation
split only watches; the test split is read once per fine-tuned network, at the end.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from _rows import row, write
from _small_residual import RECIPE, SPEC, trained
from tightrope import models, pipeline
from tightrope.data import load
from tightrope.evaluate import accuracy
from tightrope.finetune import finetune
from tightrope.recipe import Recipe
from tightrope.shard import launch


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
    parser.add_argument(
        "--seeds", type=int, default=1, help="of fine-tuning; rows are written for 2 and more"
    )
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
        shard=launch(accelerator="cuda" if torch.cuda.is_available() else "cpu"),
    )
    plan = bundle.plan()
    for site, choice in plan.choices.items():
        print(site, choice["polynomial"])
    print(f"{plan.predicted.ckks_levels:g} levels", flush=True)
    recipe = replace(chosen.recipe, epochs=given.epochs or chosen.recipe.epochs)
    first = pipeline.train(bundle, recipe, resume=False, log=print) | pipeline.test(bundle)
    print(first, flush=True)
    tests = [first["test"]]
    for seed in range(1, given.seeds):
        start = bundle.rewritten()
        tuned = finetune(start, data, teacher=bundle.base(), recipe=replace(recipe, seed=seed))
        tests.append(accuracy(tuned, data, "test"))
        print(seed, tests[-1], flush=True)
    if given.seeds > 1:
        what = f"{given.network}, {plan.budget}, polynomials {given.polynomials or chosen.polynomials}"
        rows = [
            row(f"{what}: test accuracy, mean of {given.seeds} seeds", 100 * statistics.mean(tests), "%"),
            row(f"{what}: standard deviation", 100 * statistics.stdev(tests), "%"),
            row(f"{given.network} with ReLUs: test accuracy", 100 * first["test_base"], "%"),
        ]
        command = f"python benchmarks/train_paf.py --network {given.network} --budget '{plan.budget}'"
        command += f" --polynomials '{given.polynomials or chosen.polynomials}' --seeds {given.seeds}"
        write(f"paf_seeds_{bundle.path.name}", [{"issue": 3, "command": command, **r} for r in rows])


if __name__ == "__main__":
    main()
