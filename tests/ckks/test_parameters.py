"""No parameters outside the security table, whatever asks for them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightrope.errors import InputError
from tightrope.runtimes.ckks import CKKS
from tightrope.runtimes.ckks.parameters import (
    MAX_LOG_QP,
    Parameters,
    choose,
    choose_bootstrapping,
    insecure_test_parameters,
    max_levels,
    max_refresh,
)


@given(st.integers(1, 60), st.integers(30, 50), st.sampled_from([None, 14, 15, 16]))
def test_what_is_chosen_is_in_the_table_and_has_the_levels(
    levels: int, scale_bits: int, log_n: int | None
) -> None:
    try:
        chosen = choose(levels, scale_bits, log_n)
    except InputError as error:
        assert str(levels) in str(error) and "levels for N = 2^" in str(error)
        assert levels > max_levels(log_n or 16, scale_bits)
        return
    assert chosen.levels == levels
    assert sum(chosen.q_bits) + sum(chosen.p_bits) <= MAX_LOG_QP[chosen.log_n]
    smaller = [n for n in MAX_LOG_QP if n < chosen.log_n]
    if log_n is None:
        assert all(levels > max_levels(n, scale_bits) for n in smaller)
    digit = sum(chosen.q_bits[: len(chosen.p_bits)])
    assert sum(chosen.p_bits) > digit  # else key switching drowns in noise


@pytest.mark.parametrize(("log_n", "q", "p"), [(14, 380, 59), (15, 821, 61), (16, 1700, 68), (13, 60, 30)])
def test_a_bit_too_many_is_refused_with_both_values(log_n: int, q: int, p: int) -> None:
    with pytest.raises(InputError, match="not secure") as error:
        Parameters(log_n, (q,), (p,), 40)
    assert f"log2(QP) = {q + p} for N = 2^{log_n}" in str(error.value)
    assert "at most 438 for N = 2^14; at most 881 for N = 2^15; at most 1767 for N = 2^16" in str(error.value)


def test_the_limits_themselves_are_allowed() -> None:
    for log_n, most in MAX_LOG_QP.items():
        assert Parameters(log_n, (most - 50,), (50,), 40).log_qp == most


def test_toy_rings_say_that_they_are_insecure() -> None:
    toy = insecure_test_parameters(5)
    assert toy.insecure and toy.log_n not in MAX_LOG_QP
    with pytest.raises(InputError, match="not secure"):
        Parameters(toy.log_n, toy.q_bits, toy.p_bits, toy.scale_bits)


@pytest.mark.parametrize("options", [{"threads": 1.5}, {"log_n": 15.0}, {"threads": True}, {"port": "1"}])
def test_whole_numbers_are_asked_for(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="must be a whole number"):
        CKKS(**options)


@given(st.integers(30, 50))
def test_a_bootstrap_gives_at_most_what_the_ring_has_room_for(scale_bits: int) -> None:
    most = max_refresh(scale_bits)
    full, beyond = choose_bootstrapping(most, scale_bits), choose_bootstrapping(most + 1, scale_bits)
    assert full is not None and full.levels == most and beyond is None
    assert CKKS(scale_bits=scale_bits, refresh_levels=most).refresh_levels == most
    with pytest.raises(InputError, match=f"0 to {most}"):
        CKKS(scale_bits=scale_bits, refresh_levels=most + 1)


def test_the_cap_of_the_default_scale() -> None:
    assert max_refresh(40) == 20


@pytest.mark.parametrize(
    "options", [{"log_n": 12}, {"log_n": 17}, {"scale_bits": 20}, {"threads": 0}, {"timeout_s": 0.0}]
)
def test_the_runtime_takes_no_option_outside(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"out of range|no such ring"):
        CKKS(**options)  # type: ignore[arg-type]
