"""The fits behind a calibrated machine (`tests/unit/cli/test_doctor.py` makes a whole one)."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megallama.train.calibrate import fit_line, fit_rate, median_of

SIZES = (128, 256, 512, 1024)


@given(st.floats(1e-6, 1.0), st.floats(1e-9, 1e-3))
def test_a_line_is_found_again(start: float, slope: float) -> None:
    found = fit_line(SIZES, [start + slope * size for size in SIZES])
    assert found == pytest.approx((start, slope), rel=1e-6)


@given(st.floats(1e6, 1e15), st.floats(1.0, 1e4))
def test_a_rate_that_grows_with_the_size_is_found_again(rate: float, half: float) -> None:
    found = fit_rate({size: (1 + half / size) / rate for size in SIZES})
    assert found == pytest.approx((rate, half), rel=1e-6)


def test_a_rate_that_does_not_grow_is_the_same_at_every_size() -> None:
    assert fit_rate(dict.fromkeys(SIZES, 0.25)) == (
        pytest.approx(4.0),
        pytest.approx(0.0, abs=1e-9),
    )
    rate, half = fit_rate({size: 1.0 + size / 1024 for size in SIZES})
    assert half == 0.0
    assert 1 / 2.0 < rate < 1 / 1.125


def test_no_figure_is_negative() -> None:
    start, slope = fit_line([1, 2, 3], [1.0, 4.0, 9.0])
    assert start == 0.0
    assert 1.0 < slope < 3.0
    assert fit_line([1, 2, 3], [3.0, 2.0, 1.0])[1] == 0.0


def test_ranks_agree_on_the_median() -> None:
    ranks = [{"a": value, "b": {"c": 10 * value}} for value in (1, 5, 2)]
    assert json.loads(median_of([json.dumps(rank) for rank in ranks])) == {"a": 2, "b": {"c": 20}}
