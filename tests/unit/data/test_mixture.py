"""The mixture is exact to less than one sample over every prefix."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.data.mixture import MAX_PERIOD, Mixture, exact_weight
from megallama.errors import ConfigError

LLAMA = ["0.67", "0.15", "0.045", "0.045", "0.045", "0.025", "0.02"]


def worst_times_period(mixture: Mixture, periods: int) -> int:
    """max over sources and prefixes of |count − n·c/M|·M, in whole numbers."""
    n = np.arange(1, periods * mixture.period + 1)
    sources, _ = mixture.locate(n - 1)
    return max(
        int(np.abs(np.cumsum(sources == s) * mixture.period - n * share).max())
        for s, share in enumerate(mixture.shares)
    )


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8))
def test_every_prefix_is_exact_to_less_than_one_sample(weights: list[int]) -> None:
    mixture = Mixture([Fraction(w) for w in weights])
    assert mixture.exact
    assert [Fraction(c, mixture.period) for c in mixture.shares] == [
        Fraction(w, sum(weights)) for w in weights
    ]
    assert worst_times_period(mixture, 3) < mixture.period


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(0, 2000))
def test_ranks_and_counts_agree_with_a_plain_count(weights: list[int], n: int) -> None:
    mixture = Mixture([Fraction(w) for w in weights])
    sources, ranks = mixture.locate(np.arange(n))
    seen = [0] * len(weights)
    for source, rank in zip(sources.tolist(), ranks.tolist(), strict=True):
        assert rank == seen[source]
        seen[source] += 1
    assert mixture.counts(n).tolist() == seen


def test_llamas_mixture() -> None:
    mixture = Mixture([exact_weight(w, "") for w in LLAMA])
    assert (mixture.period, mixture.shares) == (200, [134, 30, 9, 9, 9, 5, 4])
    assert worst_times_period(mixture, 2) < 200
    assert mixture.counts(10**12).tolist() == [
        int(Fraction(w) * 10**12) for w in LLAMA
    ]  # no overflow, no drift


def test_weights_of_a_large_denominator_are_apportioned() -> None:
    weights = [Fraction("0.333333333"), Fraction("0.333333333"), Fraction("0.333333334")]
    mixture = Mixture(weights)
    assert not mixture.exact
    assert mixture.period == MAX_PERIOD
    assert sum(mixture.shares) == MAX_PERIOD
    for share, weight in zip(mixture.shares, weights, strict=True):
        assert abs(share - weight * MAX_PERIOD) < 1
    assert worst_times_period(mixture, 1) < MAX_PERIOD


@pytest.mark.parametrize("weight", [0, -1, "nan", "inf", "", "1/0", "much", float("nan")])
def test_bad_weights(weight: str | float) -> None:
    with pytest.raises(ConfigError, match=r"source 'a': weight .* is not a positive number"):
        exact_weight(weight, "source 'a'")


def test_weights_mean_their_decimals() -> None:
    assert exact_weight(0.045, "") == Fraction(9, 200)
    assert exact_weight("4.5e-2", "") == Fraction(9, 200)
    assert exact_weight(3, "") == 3
