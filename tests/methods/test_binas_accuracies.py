"""Measured accuracies: against networks evaluated one by one, exhaustive means, and interruptions."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from methods.binas_toys import SPACE, random_supernet, textures
from tightrope.errors import BundleError, InputError
from tightrope.evaluate import accuracy, recalibrate
from tightrope.finetune import Recipe, finetune
from tightrope.methods.binas.accuracies import Accuracies, measure
from tightrope.methods.binas.contributions import contributions, drawn, summary
from tightrope.methods.binas.extract import extract
from tightrope.methods.binas.objective import staged
from tightrope.methods.binas.space import Stage
from tightrope.methods.binas.supernet import Supernet

DATA = textures(train=320)
CHOICES = [SPACE.random(np.random.default_rng(seed)) for seed in range(6)]


@pytest.fixture(scope="module")
def net() -> Supernet:
    """Trained for some steps, which makes networks differ."""
    recipe = Recipe(epochs=2, batch_size=16, lr=0.1, ema=0.5, accelerator="cpu")
    torch.manual_seed(0)
    return finetune(Supernet(SPACE), DATA, recipe=recipe)


def test_accuracies_are_those_of_the_extracted_networks(net: Supernet):
    found = measure(net, DATA, CHOICES)
    assert len(set(found.mean)) > 3
    assert found.mean.tolist() == [accuracy(extract(net, c), DATA, "validation") for c in CHOICES]
    few = measure(net, DATA, CHOICES[:1], images=10, split="test")
    assert few.mean[0] == accuracy(extract(net, CHOICES[0]), DATA, "test", limit=10)


def test_accuracies_with_batch_norm_of_their_own(net: Supernet):
    found = measure(net, DATA, CHOICES, calibration=50)
    for choice, mean in zip(CHOICES, found.mean, strict=True):
        plain = extract(net, choice)
        recalibrate(plain, DATA.batches("train", 500, limit=50))
        assert mean == accuracy(plain, DATA, "validation")
    assert (found.hits != measure(net, DATA, CHOICES).hits).any()


def test_standard_errors():
    hits = np.random.default_rng(0).random((400, 300)) < np.linspace(0.2, 0.9, 300)
    table = Accuracies(((),) * 400, hits)
    # Independent networks: the spread of their means is the paired error, and less than that over images.
    assert table.paired_error.mean() == pytest.approx(table.mean.std(), rel=0.1)
    p = table.mean[0]
    assert table.error[0] == pytest.approx((p * (1 - p) / 299) ** 0.5)
    same = Accuracies(((), ()), np.stack([hits[0], hits[0]]))
    assert (same.paired_error == 0).all()


def test_measuring_goes_on_where_it_stopped(tmp_path: Path, net: Supernet):
    expected, file = measure(net, DATA, CHOICES), tmp_path / "table.safetensors"
    done = []

    def stop(what: str, k: int, of: int) -> None:
        done.append((k, of))
        if k == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(net, DATA, CHOICES, file=file, progress=stop)
    rest = []
    # In another order, with one more that is asked for twice.
    more = [*CHOICES[::-1], SPACE.largest(), SPACE.largest()]
    found = measure(net, DATA, more, file=file, progress=lambda what, k, of: rest.append(of))
    assert rest == [4] * 4
    assert (found.hits[:6] == expected.hits[::-1]).all()
    assert (found.hits[6] == found.hits[7]).all()
    measure(net, DATA, more, file=file, progress=lambda *args: pytest.fail("all is there"))
    for other, settings in ((random_supernet(seed=1).float(), {}), (net, {"calibration": 9})):
        with pytest.raises(BundleError, match="another run"):
            measure(other, DATA, CHOICES, file=file, **settings)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(BundleError, match="damaged"):
        measure(net, DATA, CHOICES, file=file)


def test_nothing_to_measure_is_refused(net: Supernet):
    for choices, images in (([], None), (CHOICES, 0)):
        with pytest.raises(InputError, match="nothing to measure"):
            measure(net, DATA, choices, images=images)
    with pytest.raises(InputError, match="no such option"):
        measure(net, DATA, [((99,), (0,))])
    with pytest.raises(InputError, match="passes=1"):
        contributions(net, DATA, passes=1)


def truth(options: np.ndarray, depths: np.ndarray, ease: np.ndarray) -> np.ndarray:
    """Whether a made-up network of depth 1 or 2, its options in the last axis, is right on each image."""
    score = 0.1 * (options[..., 0] % 4) + 0.4 * (depths == 2) * (0.5 + options[..., 1] / 8) + ease
    return score > 0.7


def test_contributions_are_means_over_all_networks_with_the_decision():
    """Against every network of a small space on every image, within four standard errors."""
    space = replace(SPACE, stages=(Stage(8, 1, (1, 2), "re"),))
    images, passes = 300, 200
    ease = np.random.default_rng(0).random(images)
    paths = [drawn(space, images, 0, k) for k in range(passes)]
    table = np.stack([truth(p.options.numpy(), p.depths[:, 0].numpy(), ease) for p in paths])
    means, errors = summary(space, table, paths)
    grid = np.array(list(itertools.product((1, 2), range(8), range(8))))
    every = truth(grid[:, None, 1:], grid[:, 0, None], ease).mean(1) * 100
    expected = {
        "depth": np.array([every[grid[:, 0] == d].mean() for d in (1, 2)]),
        "first": np.array([every[grid[:, 1] == k].mean() for k in range(8)]),
        "second": np.array([every[(grid[:, 0] == 2) & (grid[:, 2] == k)].mean() for k in range(8)]),
    }
    assert means.mean == pytest.approx(every.mean(), abs=0.5)
    found = {"depth": means.depth[0], "first": means.block[0][0], "second": means.block[0][1]}
    noise = {"depth": errors.depth[0], "first": errors.block[0][0], "second": errors.block[0][1]}
    for name, values in expected.items():
        apart = (found[name] - means.mean) - (values - every.mean())
        assert (np.abs(apart) < 4 * noise[name]).all(), name
        assert noise[name].max() < 1.5  # points: enough to tell the options above apart
    assert np.ptp(expected["second"]) > 10


def test_contributions_of_a_supernet_fit_its_objective_and_resume(tmp_path: Path, net: Supernet):
    means, errors = contributions(net, DATA, passes=12)
    staged(SPACE, means, {"macs": 1e9})
    assert all((e > 0).all() for e in (*errors.depth, *errors.block))
    file = tmp_path / "passes.safetensors"

    def stop(what: str, k: int, of: int) -> None:
        if k == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        contributions(net, DATA, passes=12, file=file, progress=stop)
    seen = []
    again, _ = contributions(net, DATA, passes=12, file=file, progress=lambda what, k, of: seen.append(k))
    assert seen == [7, 8, 9, 10, 11]
    assert again.mean == means.mean
    assert all((a == b).all() for a, b in zip(again.block, means.block, strict=True))
    with pytest.raises(InputError, match="hardly ever drawn"):
        contributions(net, DATA, passes=2, images=4)


def test_a_pass_is_the_same_networks_however_it_is_cut():
    whole = drawn(SPACE, 40, 3, 5)
    assert torch.equal(whole.options, drawn(SPACE, 40, 3, 5).options)
    assert not torch.equal(whole.options, drawn(SPACE, 40, 3, 6).options)
    assert not torch.equal(whole.options, drawn(SPACE, 40, 4, 5).options)
