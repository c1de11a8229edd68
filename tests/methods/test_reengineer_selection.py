"""Which epoch is taken, on scripted histories; the front of a run."""

from __future__ import annotations

import pytest

from tightrope.methods.reengineer.selection import Best, Fewest, front


def run(history, floor=0.9, patience=None):
    rule = Fewest(floor, patience)
    seen = 0
    for accuracy, share in history:
        seen += 1
        if not rule.offer(accuracy, share, lambda k=seen: k):
            break
    return rule.result, seen


@pytest.mark.parametrize(
    ("history", "epoch"),
    [
        ([(0.95, 0.9), (0.91, 0.5), (0.89, 0.1)], 2),  # fewest that hold the floor
        ([(0.92, 0.5), (0.95, 0.5), (0.94, 0.5)], 2),  # ties go to the accuracy
        ([(0.95, 0.5004), (0.92, 0.5001)], 1),  # the same thousandth: fewer, but less accurate
        ([(0.92, 0.5001), (0.95, 0.5004)], 1),  # more accurate, but not fewer
        ([(0.92, 0.5004), (0.95, 0.5001)], 2),
        ([(0.90, 0.4)], 1),  # the floor itself holds
        ([(0.90, 1.0), (0.95, 1.0)], 2),  # nothing pruned yet: the accuracy decides
        ([(0.8, 0.5), (0.85, 0.3), (0.7, 0.2)], 2),  # no epoch holds: largest accuracy minus share
        ([(0.85, 0.1), (0.95, 0.9)], 2),  # the fallback is only for that case
    ],
)
def test_the_published_rule(history, epoch):
    assert run(history)[0] == epoch


def test_patience_counts_epochs_below_the_floor_once_it_was_reached():
    low = (0.5, 0.01)
    assert run([low] * 5 + [(0.95, 0.5), low, low, (0.95, 0.4)], patience=2) == (6, 8)
    assert run([(0.95, 0.5), low, (0.95, 0.4), low, (0.95, 0.3)], patience=2) == (5, 5)
    assert run([(0.95, 0.5), low, low, (0.95, 0.4)]) == (4, 4)


def test_best_takes_the_most_accurate_feasible_epoch():
    rule = Best()
    for k, (accuracy, feasible) in enumerate([(0.9, False), (0.7, True), (0.8, True), (0.75, True)]):
        rule.offer(accuracy, feasible, lambda k=k: k)
    assert rule.best == 2


def test_the_front_drops_what_another_point_beats():
    def point(w, m, a):
        return {"weights": w, "macs": m, "accuracy": a}

    a, b, c, d = point(1, 5, 0.5), point(2, 2, 0.6), point(2, 3, 0.6), point(9, 9, 0.9)
    assert front([d, c, b, a]) == [a, b, d]
