"""Attacks stay within their bounds, rates are counted right, and students start where they should."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from scipy.stats import binomtest
from torch import nn

from commands import call, refused
from tightrope import models
from tightrope.data import load, parse_task, view
from tightrope.errors import InputError
from tightrope.graph import trace
from tightrope.methods.reengineer import defects
from tightrope.methods.reengineer.attacks import Attack, feature_attack, features, label_attack
from tightrope.methods.reengineer.defects import Inherited, Study, make, search_mask, study, wilson
from tightrope.models.resnet import ResNet

DATA = load("embedded")
GRAPH = trace(models.resolve("demo"), DATA.input_shape)
TASK = view(DATA, parse_task(DATA.classes, chosen="7,9"))
TASK = replace(TASK, splits={**TASK.splits, "train": tuple(part[:128] for part in TASK.splits["train"])})
SMALL = trace(ResNet(8, ((8, 1, 2), (16, 1, 2)), 10, 1).eval(), DATA.input_shape)
QUICK = Study(search_epochs=1, epochs=1, images=32, iterations=2, removed=0.01, lr_mask=1.0)


def attack(**settings) -> Attack:
    given = {"mean": tuple(DATA.mean), "std": tuple(DATA.std), "eps": 0.05, "step": 0.02, "iterations": 5}
    return Attack(**given | settings)


def test_attacks_stay_within_eps_and_within_pixels():
    x, y = next(TASK.batches("test", 16))
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (DATA.mean, DATA.std))
    donor = features(GRAPH)
    for made in (feature_attack(donor, x, attack()), label_attack(GRAPH.module, x, y, attack())):
        pixels, before = made * std + mean, x * std + mean
        assert float((pixels - before).abs().max()) <= 0.05 + 1e-6
        assert float(pixels.min()) >= -1e-6 and float(pixels.max()) <= 1 + 1e-6
        assert float((pixels - before).abs().max()) > 0.04  # and uses what it may
    again = feature_attack(donor, x, attack())
    assert torch.equal(again, feature_attack(donor, x, attack()))
    assert not torch.equal(again, feature_attack(donor, x, attack(seed=1)))


def test_the_feature_attack_moves_the_first_feature_and_the_standard_one_the_labels():
    x, y = next(DATA.batches("test", 64))
    donor = features(GRAPH)
    made = feature_attack(donor, x, attack())
    with torch.no_grad():
        assert donor(x).shape[1] == 64
        moved = donor(made)[:, 0] - donor(x)[:, 0]
        assert float(moved.mean()) > 0.5
        right = (GRAPH.module(x).argmax(1) == y).sum()
    broken = label_attack(GRAPH.module, x, y, attack())
    with torch.no_grad():
        assert (GRAPH.module(broken).argmax(1) == y).sum() < right / 2


def test_features_need_a_linear_layer_at_the_end():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with pytest.raises(InputError, match="end in a linear layer"):
        features(trace(net, (1, 8, 8)))


@pytest.mark.parametrize(("hits", "of"), [(0, 10), (3, 10), (10, 10), (57, 400)])
def test_intervals_are_wilsons(hits, of):
    want = binomtest(hits, of).proportion_ci(0.95, "wilson")
    assert wilson(hits, of) == pytest.approx((want.low, want.high), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


class ByMean(nn.Module):
    """Label 1 where the mean of an image is positive."""

    def forward(self, x):
        mean = x.mean((1, 2, 3))
        return torch.stack([-mean, mean], 1)


def test_the_rate_counts_images_that_were_right_and_no_longer_are():
    """By hand: of five images four are right, two of these broken; the wrong one does not count."""
    before = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0]).view(5, 1, 1, 1)
    labels = torch.tensor([1, 1, 0, 0, 0])
    attacked = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]).view(5, 1, 1, 1)
    still = Attack(mean=(0.5,), std=(1.0,), eps=1e-6, step=1e-7, iterations=1)
    tried = defects.try_on("x", ByMean(), [(before, labels)], [attacked], still, QUICK, None)
    assert (tried.images, tried.correct, tried.broken) == (5, 4, 2)
    assert tried.rate == 0.5 and tried.to_dict()["accuracy"] == 0.8


def test_students_start_where_they_should():
    bits = search_mask(SMALL, TASK, QUICK)
    assert sum(int((~b).sum()) for b in bits.values()) > 0
    first = {name: make(name, SMALL, TASK, QUICK, bits) for name in ("masked", "regrow", "reinit", "scratch")}
    donor = dict(SMALL.module.named_parameters())

    def off(name):
        found = dict(first[name].named_parameters())
        return torch.cat([found[k][~b] for k, b in bits.items()])

    assert not off("masked").any()
    assert off("regrow").any() and off("reinit").std() > 5 * off("regrow").std()
    scratch = dict(first["scratch"].named_parameters())
    for key in bits:
        if donor[key].dim() == 4:
            both = torch.stack([donor[key].flatten(), scratch[key].flatten()])
            assert abs(torch.corrcoef(both)[0, 1]) < 0.5


def test_a_study_is_the_same_twice_and_has_every_student():
    small = Study(**{**vars(QUICK), "students": "standard,masked"})
    one, two = (study(SMALL, TASK, small, lambda *_: None) for _ in range(2))
    assert one == two and [o.student for o in one] == ["standard", "masked"]
    assert all(isinstance(o, Inherited) and o.images == 32 and o.broken <= o.correct for o in one)
    assert one[0].kept == 1 > one[1].kept


def test_the_command_and_bad_input(tmp_path, monkeypatch, capsys):
    base = ("reengineer", "defects", "--model", "demo", "--donor-classes", "10", "--classes", "7,9")
    quick = ("--set", "epochs=1", "--set", "iterations=1", "--set", "images=16")
    out = tmp_path / "defects.json"
    assert call(monkeypatch, *base, *quick, "--set", "students=standard", "--out", out, "--json") == 0
    body = json.loads(capsys.readouterr().out)
    assert body == json.loads(out.read_text())
    assert body["students"][0]["images"] == 16 and body["settings"]["epochs"] == 1
    refused(monkeypatch, capsys, *base, "--set", "students=mended", says="unknown student")
    refused(monkeypatch, capsys, *base, "--set", "removed=1.5", says="removed is a share")
    refused(monkeypatch, capsys, *base, "--set", "epoch=1", says="no such setting")
    refused(monkeypatch, capsys, *base, "--seeds", "0", says="seeds must be positive")
