"""Measurements of block_relu resume, and notice damage and other settings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from block_relus import SMALL, measure
from networks import NETWORKS, TinyResNet, images, settle
from tightrope.errors import BundleError
from tightrope.graph import trace
from tightrope.runtimes.plain import Plain

SHAPE = (3, 8, 8)


def test_a_measurement_resumes_where_it_stopped(tmp_path):
    net = settle(TinyResNet())
    data = images(SHAPE)
    first = measure(net, data, workdir=tmp_path)
    assert first.meta["passes"] == 2 * 2 * (1 + 5)  # chunks of sites, batches, one forward and 5 outputs
    assert {p.name for p in tmp_path.iterdir()} == {f"{t.site}.npz" for t in first.tables}
    read = len(data.reads)
    assert read > 0
    again = measure(net, data, workdir=tmp_path)
    assert again.meta["passes"] == 0
    assert len(data.reads) == read + 2  # the images were compared, nothing else
    assert [t.loss.tobytes() for t in again.tables] == [t.loss.tobytes() for t in first.tables]
    (tmp_path / "layer1.relu.npz").unlink()
    third = measure(net, data, workdir=tmp_path)
    assert third.meta["passes"] == 2 * (1 + 5)
    for a, b in zip(first.tables, third.tables, strict=True):
        np.testing.assert_allclose(a.loss, b.loss, rtol=1e-6)


def test_an_interrupted_measurement_keeps_what_was_done(tmp_path):
    net, data = settle(TinyResNet()), images(SHAPE)

    def stop(what, done, of):
        raise KeyboardInterrupt

    for kept in (1, 5):  # the first site alone, then chunks
        with pytest.raises(KeyboardInterrupt):
            SMALL.measure(trace(net, SHAPE), data, cost=Plain(), workdir=tmp_path, progress=stop)
        assert len(list(tmp_path.iterdir())) == kept
    assert measure(net, data, workdir=tmp_path).meta["passes"] == 0


def test_an_interrupted_check_keeps_the_sites_that_were_done(tmp_path):
    net, data = settle(TinyResNet()), images(SHAPE)
    method = replace(SMALL, verify=30)
    whole = measure(net, data, method).meta
    seen = []

    def stop(what, done, of):
        seen.append(what)
        if seen.count("exact check") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method.measure(trace(net, SHAPE), data, cost=Plain(), workdir=tmp_path, progress=stop)
    checked = sorted(p for p in tmp_path.iterdir() if p.name.endswith(".check.npz"))
    assert len(checked) == 2
    before = [p.read_bytes() for p in checked]
    again = measure(net, data, method, workdir=tmp_path).meta
    assert [p.read_bytes() for p in checked] == before
    assert again["passes"] == 0
    for key in ("check", "check_repaired", "spearman", "spearman_repaired", "verified"):
        assert again[key] == whole[key], key
    more = measure(net, data, replace(method, verify=31), workdir=tmp_path).meta
    assert more["verified"] == len(more["check"]) == 31 and more["passes"] == 0


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"noise" * 20])
def test_a_damaged_file_is_named(tmp_path, damage):
    net, data = settle(TinyResNet()), images(SHAPE)
    measure(net, data, workdir=tmp_path)
    path = tmp_path / "layer2.relu.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BundleError, match=r"damaged(.|\n)*layer2.relu.npz(.|\n)*delete the file"):
        measure(net, data, workdir=tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"samples": 11}, {"directions": 3}, {"seed": 1}, {"relu6": "relu"}, {"max_pool": "avg"}],
)
def test_another_configuration_is_measured_anew(tmp_path, changes):
    net, data = settle(NETWORKS["mobile"]()), images(SHAPE)
    measure(net, data, workdir=tmp_path)
    other = replace(SMALL, **changes)
    resumed = measure(net, data, other, workdir=tmp_path)
    fresh = measure(net, data, other)
    assert resumed.meta["passes"] == fresh.meta["passes"] > 0
    assert [t.loss.tobytes() for t in resumed.tables] == [t.loss.tobytes() for t in fresh.tables]


def test_other_weights_and_other_images_are_measured_anew(tmp_path):
    net, data = settle(TinyResNet()), images(SHAPE)
    measure(net, data, workdir=tmp_path)
    assert measure(net, replace(data, name="others"), workdir=tmp_path).meta["passes"] > 0
    other = data.x.clone()
    other[SMALL.samples - 1, 0, 0, 0] += 1e-3  # the last image that is used
    assert measure(net, replace(data, x=other, name="others"), workdir=tmp_path).meta["passes"] > 0
    other = data.x.clone()
    other[SMALL.samples] += 1  # not used
    assert measure(net, data, workdir=tmp_path).meta["passes"] > 0
    assert measure(net, replace(data, x=other), workdir=tmp_path).meta["passes"] == 0
    assert measure(net, replace(data, name="others"), workdir=tmp_path).meta["passes"] > 0
    with torch.no_grad():
        net.fc.bias[0] += 1
    assert measure(net, replace(data, name="others"), workdir=tmp_path).meta["passes"] > 0
    assert measure(net, replace(data, name="others"), workdir=tmp_path).meta["passes"] == 0


def test_fewer_sites_and_exact_checks_reuse_what_was_measured(tmp_path):
    net, data = settle(TinyResNet()), images(SHAPE)
    measure(net, data, workdir=tmp_path)
    other = measure(net, data, replace(SMALL, sites="layer1.*", verify=5, batch_size=4), workdir=tmp_path)
    assert other.meta["passes"] == 0
    assert other.meta["verified"] == len(other.meta["check"]) == 5
