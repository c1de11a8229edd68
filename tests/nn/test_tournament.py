"""The tournament equals torch's max-pooling, before any of its ReLUs becomes a polynomial."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from tightrope.graph import trace
from tightrope.lower import lower
from tightrope.nn.tournament import MaxTournament, Round
from tightrope.runtimes.plain import evaluate

pairs = st.tuples(st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=60)
@given(pairs, pairs, pairs, st.tuples(st.integers(3, 11), st.integers(3, 11)), st.booleans())
def test_the_tournament_is_max_pooling(kernel, stride, padding, size, ceil_mode):
    padding = tuple(min(p, k // 2) for p, k in zip(padding, kernel, strict=True))
    assume(all(n + 2 * p >= k for n, p, k in zip(size, padding, kernel, strict=True)))
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode)
    pool = MaxTournament(kernel, stride, padding, size, tuple(expected.shape[2:]))
    torch.testing.assert_close(pool(x), expected)
    rounds = sum(isinstance(m, Round) for m in pool.modules())
    assert rounds == sum((k - 1).bit_length() for k in kernel)
    graph = trace(nn.Sequential(pool), (3, *size))
    assert [s.kind for s in graph.sites] == ["relu"] * rounds
    torch.testing.assert_close(evaluate(lower(graph.module, (3, *size)), x).float(), expected)
