"""The driver: when a deferred weight gradient runs, and what a pass is sent."""

from __future__ import annotations

from functools import partial

import pytest

from megallama.autograd.passes import WgradQueue, drive


class Recorded:
    """A handle that logs when it is waited for."""

    def __init__(self, log: list[str], value: object, collective: bool = True) -> None:
        self.log, self.value, self.collective = log, value, collective

    def wait(self) -> object:
        self.log.append(f"wait {self.value}")
        return self.value


def test_each_wait_for_a_collective_is_filled_with_one_deferred_piece():
    log: list[str] = []
    queue = WgradQueue()

    def body():
        queue.defer(partial(log.append, "w1"))
        queue.defer(partial(log.append, "w2"))
        queue.defer(partial(log.append, "w3"))
        log.append("b1")
        log.append(f"got {(yield Recorded(log, 'h1'))}")
        log.append(f"got {(yield Recorded(log, 'weight', collective=False))}")
        log.append(f"got {(yield Recorded(log, 'h2'))}")
        queue.defer(partial(log.append, "w4"))
        log.append("b2")
        return "result"

    assert drive(body(), queue) == "result"
    assert log == [
        *("b1", "w1", "wait h1", "got h1", "wait weight", "got weight", "w2", "wait h2"),
        *("got h2", "b2", "w3", "w4"),
    ]
    assert len(queue) == 0


def test_work_deferred_by_deferred_work_runs_too():
    log: list[str] = []
    queue = WgradQueue()
    queue.defer(lambda: (log.append("first"), queue.defer(partial(log.append, "second"))))

    def nothing():
        return None
        yield

    drive(nothing(), queue)
    assert log == ["first", "second"]
    queue.run_one()
    assert log == ["first", "second"], "each runs once"


def test_passes_nest_and_may_yield_nothing():
    log: list[str] = []

    def inner():
        return (yield Recorded(log, 2)) + 1

    def outer():
        return 10 * (yield from inner())

    def empty():
        return 7
        yield

    assert drive(outer()) == 30
    assert drive(empty()) == 7


def test_the_queue_given_is_used_even_when_it_is_empty():
    """What an earlier pass left in the queue is run by the next drive, not lost."""
    queue = WgradQueue()
    log: list[str] = []

    def body():
        yield Recorded(log, "h")
        queue.defer(partial(log.append, "w"))

    drive(body(), queue)
    assert log == ["wait h", "w"]


def test_an_error_in_a_pass_reaches_the_caller():
    def body():
        yield Recorded([], 1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        drive(body())
