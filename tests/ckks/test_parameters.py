"""No parameters outside the security table, whatever asks for them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tightrope.errors import InputError
from tightrope.runtimes.ckks import CKKS, lattigo
from tightrope.runtimes.ckks.parameters import (
    MAX_LOG_QP,
    PRIME_BITS,
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
    assert sum(chosen.q_bits) + sum(chosen.p_bits) < MAX_LOG_QP[chosen.log_n]
    smaller = [n for n in MAX_LOG_QP if n < chosen.log_n]
    if log_n is None:
        assert all(levels > max_levels(n, scale_bits) for n in smaller)
    digit = sum(chosen.q_bits[: len(chosen.p_bits)])
    assert sum(chosen.p_bits) > digit  # else key switching drowns in noise


@pytest.mark.parametrize(("log_n", "q", "p"), [(14, 380, 58), (15, 821, 60), (16, 1700, 67), (13, 60, 30)])
def test_a_bit_too_many_is_refused_with_both_values(log_n: int, q: int, p: int) -> None:
    with pytest.raises(InputError, match="not secure") as error:
        Parameters(log_n, (q,), (p,), 40)
    assert f"log2(QP) = {q + p} for N = 2^{log_n}" in str(error.value)
    allowed = "less than 438 for N = 2^14; less than 881 for N = 2^15; less than 1767 for N = 2^16"
    assert allowed in str(error.value)


def test_a_bit_below_the_limits_is_allowed() -> None:
    for log_n, most in MAX_LOG_QP.items():
        assert Parameters(log_n, (most - 51,), (50,), 40).log_qp == most - 1


@pytest.mark.parametrize(
    ("q", "p", "boot"),
    [((), (51,), ()), ((50, 40), (), ()), ((50, -40), (51,), ()), ((50, 0), (51,), ()), ((50,), (51,), (0,))],
)
def test_primes_are_there_and_of_positive_size(
    q: tuple[int, ...], p: tuple[int, ...], boot: tuple[int, ...]
) -> None:
    with pytest.raises(InputError, match="no primes of some kind"):
        Parameters(16, q, p, 40, boot)


@pytest.mark.parametrize("log_n", MAX_LOG_QP)
def test_the_primes_that_the_library_takes_are_in_the_table_too(log_n: int) -> None:
    """Of the fullest rings; ten levels of 32 bits in N = 2^14 had 438.0008 bits, where 438 are allowed."""
    pytest.importorskip("lattigo")
    full = [choose(max_levels(log_n, bits), bits, log_n) for bits in (30, 31, 33, 39, 45, 50)]
    if log_n == 14:
        full.append(choose(10, 32, 14))
    if log_n == 16:
        booted = (choose_bootstrapping(max_refresh(bits), bits) for bits in (30, 40, 50))
        full += [one.during_bootstrap() for one in booted if one is not None]
    for one in full:
        with lattigo._parameters(one) as made:
            real = sum(map(math.log2, made.moduli_chain() + made.aux_moduli_chain()))
        assert one.log_qp - PRIME_BITS < real < min(one.log_qp + PRIME_BITS, MAX_LOG_QP[log_n])


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
