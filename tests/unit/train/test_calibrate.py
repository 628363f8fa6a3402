"""The fits behind a calibrated machine (`tests/unit/cli/test_calibrate.py` makes a whole one)."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megallama.dist.handle import Done, Handle
from megallama.train import calibrate
from megallama.train.calibrate import Calibration, median_of
from megallama.train.fits import fit_line, fit_rate
from megallama.train.kernel_calls import CPU, Kernels

SIZES = (128, 256, 512, 1024)
LARGEST = CPU.messages[-1]


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


class Wire:
    """Of two ranks that take as long as each other; a gather takes 1 s a byte that it is given."""

    size = 2

    def __init__(self) -> None:
        self.gathered: list[int] = []

    def all_gather(self, x: Tensor) -> Handle[Tensor]:
        self.gathered.append(x.nbytes)
        return Done(x)

    def all_reduce(self, x: Tensor) -> Handle[Tensor]:
        return Done(2 * x)


@pytest.fixture
def gauge(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One that has measured nothing yet, of calls that take 1 s a byte of what they return."""
    found: Any = Calibration.__new__(Calibration)
    found.group, found.sizes, found.device = Wire(), CPU, torch.device("cpu")
    found.kernels = Kernels(CPU, found.device)
    found._seconds = lambda call: call().nbytes
    monkeypatch.setattr(calibrate, "LARGEST_GATHER", 32 * LARGEST)
    return found


@pytest.mark.parametrize(
    "needed, shard",
    [
        (1, LARGEST),
        (LARGEST, LARGEST),
        (LARGEST + 1, 2 * LARGEST),
        (7 * LARGEST, 8 * LARGEST),
        (1000 * LARGEST, 16 * LARGEST),  # two of them are the largest gather
    ],
)
def test_a_gather_lasts_so_long(needed: float, shard: int, gauge: Any) -> None:
    found, flight = gauge._lasting(needed)
    assert (found.nbytes, flight) == (shard, shard)
    assert gauge.group.gathered[0] == LARGEST


def test_ranks_agree_on_how_long_it_lasts(gauge: Any) -> None:
    """Else they would gather shards of two sizes."""
    gauge.group.all_reduce = lambda x: Done(x + 3)
    assert gauge._mean(1.0) == 2.0


def test_products_end_while_the_gather_lasts(gauge: Any) -> None:
    product = 2 * CPU.tokens * CPU.ffn
    assert LARGEST < 2 * product < 2 * LARGEST
    assert gauge._contention()["compute"] >= 0
    assert gauge.group.gathered == [LARGEST, *[2 * LARGEST] * 10]


@pytest.mark.parametrize("compute, collective", [(0.25, 0.0), (1.0, 1.0), (0.5, 2.0)])
def test_each_slows_the_other_by_what_it_does(
    gauge: Any, monkeypatch: pytest.MonkeyPatch, compute: float, collective: float
) -> None:
    """A product takes 3 s and a gather 30 s, with a clock of our own."""
    clock, product, flight = SimpleNamespace(now=0.0), 3.0, 30.0

    def linear(*_: Tensor) -> None:
        clock.now += product * (1 + compute)
        clock.left -= product * (1 + compute) / (1 + collective)

    def gather(_: Tensor) -> Any:
        clock.left = flight
        return SimpleNamespace(wait=lambda: setattr(clock, "now", clock.now + clock.left))

    monkeypatch.setattr(calibrate, "linear_forward", linear)
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: clock.now)
    gauge._seconds, gauge._lasting = lambda _: product, lambda _: (torch.zeros(1), flight)
    gauge.group.all_gather = gather
    found = gauge._contention()
    assert found == pytest.approx({"compute": compute, "collective": collective})


def test_a_gpu_s_other_streams_are_not_waited_for(
    gauge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[torch.device] = []

    def stream(device: torch.device) -> Any:
        return SimpleNamespace(synchronize=lambda: waited.append(device))

    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: pytest.fail("all streams"))
    gauge.device = torch.device("cuda", 1)
    gauge._finish()
    assert waited == [gauge.device]
