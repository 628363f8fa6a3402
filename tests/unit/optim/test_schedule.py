"""Learning rates in closed form."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megallama.optim.schedule import learning_rate
from tests.unit.optim.trainers import optimizer_config

SCHEDULES = ("cosine", "linear", "wsd", "constant")


def config(schedule: str, warmup: int = 10, decay: int | None = None, low: float = 1e-4):
    if schedule == "wsd" and decay is None:
        decay = 30
    return optimizer_config(
        lr=1e-3, min_lr=low, warmup_steps=warmup, schedule=schedule, decay_steps=decay
    )


@st.composite
def runs(draw):
    """A schedule with its run: at least a step after warm-up and decay."""
    warmup, decay, stable = (
        draw(st.integers(0, 50)),
        draw(st.integers(1, 50)),
        draw(st.integers(1, 50)),
    )
    schedule = draw(st.sampled_from(SCHEDULES))
    low = draw(st.sampled_from([0.0, 1e-4, 1e-3]))
    settings = config(schedule, warmup, decay if schedule == "wsd" else None, low)
    return settings, warmup + stable + decay


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_endpoints(schedule):
    settings = config(schedule)
    assert learning_rate(settings, 1, 100) == pytest.approx(1e-4, rel=1e-15)
    assert learning_rate(settings, 5, 100) == pytest.approx(5e-4, rel=1e-15)
    assert learning_rate(settings, 10, 100) == 1e-3
    last = 1e-3 if schedule == "constant" else 1e-4
    assert learning_rate(settings, 100, 100) == pytest.approx(last, rel=1e-12)
    assert learning_rate(settings, 500, 100) == pytest.approx(last, rel=1e-12)


def test_closed_forms():
    half = (10 + 100) // 2
    assert learning_rate(config("cosine"), half, 100) == pytest.approx(5.5e-4, rel=1e-12)
    assert learning_rate(config("linear"), half, 100) == pytest.approx(5.5e-4, rel=1e-12)
    third = 10 + 30
    cosine = 1e-4 + 9e-4 * (1 + math.cos(math.pi / 3)) / 2
    assert learning_rate(config("cosine"), third, 100) == pytest.approx(cosine, rel=1e-12)
    assert learning_rate(config("linear"), third, 100) == pytest.approx(7e-4, rel=1e-12)
    wsd = config("wsd")  # its decay begins after step 70
    rates = [learning_rate(wsd, step, 100) for step in (11, 70, 71, 85, 100)]
    assert rates == pytest.approx([1e-3, 1e-3, 9.7e-4, 5.5e-4, 1e-4], rel=1e-12)


@given(run=runs())
def test_shape_of_the_curve(run):
    """Warm-up rises to the peak in equal steps; then nothing rises or leaves the range."""
    settings, total = run
    rates = [learning_rate(settings, step, total) for step in range(1, total + 1)]
    warmup = settings.warmup_steps
    for step, rate in enumerate(rates[:warmup], 1):
        assert rate == pytest.approx(settings.lr * step / warmup, rel=1e-12)
    after = rates[max(warmup - 1, 0) :]
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(after))
    assert all(settings.min_lr * (1 - 1e-9) <= rate <= settings.lr for rate in after)
    if settings.schedule == "constant":
        assert set(after) == {settings.lr}
    else:
        assert after[-1] == pytest.approx(settings.min_lr, rel=1e-9, abs=1e-15)


@given(warmup=st.integers(0, 20), decay=st.integers(1, 30), more=st.integers(1, 200))
def test_a_prolonged_wsd_run_has_the_same_rates_until_its_decay(warmup, decay, more):
    settings, total = config("wsd", warmup, decay), warmup + decay + 20
    begin = total - decay
    for step in range(1, begin + 1):
        assert learning_rate(settings, step, total) == learning_rate(settings, step, total + more)
    tail = [learning_rate(settings, begin + n, total) for n in range(decay + 1)]
    moved = [learning_rate(settings, begin + more + n, total + more) for n in range(decay + 1)]
    assert tail == moved


def test_no_warm_up_starts_at_the_peak_or_just_below():
    assert learning_rate(config("constant", warmup=0), 1, 10) == 1e-3
    assert learning_rate(config("linear", warmup=0), 1, 10) == pytest.approx(9.1e-4, rel=1e-12)


def test_runs_of_only_warm_up_and_of_only_decay():
    assert learning_rate(config("cosine", warmup=10), 10, 10) == 1e-3
    assert learning_rate(config("wsd", warmup=0, decay=10), 10, 10) == pytest.approx(1e-4)
    assert learning_rate(config("wsd", warmup=4, decay=100), 10, 10) == pytest.approx(1e-4)
