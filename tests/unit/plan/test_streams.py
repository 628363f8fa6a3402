"""Two streams in time: what runs beside what, and by how much each is slower for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megallama.plan.hardware import Contention
from megallama.plan.ops import Collective, Issued, Move, Start, Wait
from megallama.plan.streams import Lap, run
from tests.unit.plan.machines import A100

SECONDS = st.floats(0.01, 10.0)


class Given:
    """Costs: a kernel or a collective takes as many seconds as its bytes."""

    def __init__(self, compute: float = 0.0, collective: float = 0.0) -> None:
        contention = Contention(compute=compute, collective=collective)
        self.hardware = A100.model_copy(update={"contention": contention})

    def compute(self, op: Move) -> float:
        return op.bytes

    def collective(self, op: Collective) -> float:
        return op.bytes


def kernel(seconds: float) -> Move:
    return Move("kernel", "plain", seconds)  # type: ignore[arg-type]


def start(seconds: float) -> Start:
    return Start(Collective("tensor", "all_gather", 2, seconds))  # type: ignore[arg-type]


def timed(issued: Sequence[Issued], costs: Any) -> tuple[float, list[tuple[str, float, float]]]:
    laps: list[Lap] = []
    timing = run(issued, costs, laps)
    return timing.seconds, [(lap.stream, lap.start, lap.end) for lap in laps]


def test_a_wait_is_for_what_was_started() -> None:
    first, second = start(2.0), start(3.0)
    issued = [first, second, kernel(1.0), Wait((first,)), kernel(1.0), Wait((second,)), kernel(1.0)]
    assert timed(issued, Given()) == (
        6.0,
        [
            ("compute", 0.0, 1.0),
            ("tensor", 0.0, 2.0),
            ("compute", 2.0, 3.0),
            ("tensor", 2.0, 5.0),
            ("compute", 5.0, 6.0),
        ],
    )


def test_what_nobody_waits_for_is_done_at_the_end() -> None:
    assert timed([kernel(1.0), start(2.0), kernel(1.0)], Given())[0] == 3.0


@pytest.mark.parametrize(
    "compute, collective, seconds, landed",
    [
        (0.0, 0.0, 4.0, 1.0),
        (0.5, 0.0, 1.0 + (4.0 - 1.0 / 1.5), 1.0),  # 2/3 of a second is computed in the first one
        (0.0, 1.0, 4.0, 2.0),
        (1.0, 1.0, 2.0 + 3.0, 2.0),  # as if one came after the other
    ],
)
def test_each_slows_the_other(
    compute: float, collective: float, seconds: float, landed: float
) -> None:
    issued = [start(1.0), kernel(4.0)]
    found, laps = timed(issued, Given(compute, collective))
    assert found == pytest.approx(seconds)
    assert laps[0] == ("tensor", 0.0, pytest.approx(landed))


def test_a_collective_that_outlasts_a_kernel_goes_on_alone() -> None:
    started = start(4.0)
    issued = [started, kernel(1.0), Wait((started,)), kernel(1.0)]
    # 2 seconds beside the kernel are one of the collective's four.
    assert timed(issued, Given(1.0, 1.0))[0] == pytest.approx(2.0 + 3.0 + 1.0)


@given(st.lists(st.tuples(SECONDS, st.booleans()), min_size=1, max_size=12), st.floats(0.1, 0.9))
def test_a_core_that_is_shared_gains_nothing(steps: list[tuple[float, bool]], share: float) -> None:
    """Kernels get `share` of it while a collective is in flight, which gets the rest."""
    issued = [start(each) if communicates else kernel(each) for each, communicates in steps]
    found = timed(issued, Given(1 / share - 1, 1 / (1 - share) - 1))[0]
    assert found == pytest.approx(sum(each for each, _ in steps))
