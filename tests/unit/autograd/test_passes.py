"""The driver: when a deferred weight gradient runs, whose turn it is, and what a pass is sent."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.autograd.passes import PAUSE, Pass, WgradQueue, drive, in_turns


class Recorded:
    """A handle that logs when it is waited for."""

    def __init__(self, log: list[str], value: object, cover: int = 1) -> None:
        self.log, self.value, self.cover = log, value, cover

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
        log.append(f"got {(yield Recorded(log, 'weight', cover=0))}")
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


def test_a_cover_of_two_is_filled_with_two_or_what_there_is():
    log: list[str] = []
    queue = WgradQueue()

    def body():
        for name in ("w1", "w2", "w3"):
            queue.defer(partial(log.append, name))
        yield Recorded(log, "h1", cover=2)
        yield Recorded(log, "h2", cover=2)
        yield Recorded(log, "h3", cover=2)

    drive(body(), queue)
    assert log == ["w1", "w2", "wait h1", "w3", "wait h2", "wait h3"]


def test_without_overlap_nothing_is_put_off():
    """The order among weight gradients is the same, and so is every bit."""
    logs: dict[bool, list[str]] = {}
    for overlap in (True, False):
        log = logs[overlap] = []
        queue = WgradQueue(overlap)

        def body(queue: WgradQueue = queue, log: list[str] = log) -> Pass[None]:
            queue.defer(partial(log.append, "w1"))
            queue.defer(partial(log.append, "w2"))
            log.append(f"{len(queue)} wait")
            yield Recorded(log, "h")
            queue.defer(partial(log.append, "w3"))

        drive(body(), queue)
        assert len(queue) == 0
    assert logs[False] == ["w1", "w2", "0 wait", "wait h", "w3"]
    assert logs[True] == ["2 wait", "w1", "wait h", "w2", "w3"]


def test_work_deferred_by_deferred_work_runs_too():
    log: list[str] = []
    queue = WgradQueue()
    queue.defer(lambda: (log.append("first"), queue.defer(partial(log.append, "second"))))

    def nothing():
        return None
        yield

    drive(nothing(), queue)
    queue.run(len(queue))
    assert log == ["first", "second"]
    queue.run(1)
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


def numbered(log: list[str], name: str, turns: int) -> Pass[None]:
    """A pass that works, starts a collective and wants its value, `turns` times; then an end."""
    for turn in range(turns):
        log.append(f"{name}{turn}")
        got = yield Recorded(log, f"{name}{turn}")
        log.append(f"{name} got {got}")
    log.append(f"{name} ends")


def work(log: list[str]) -> list[str]:
    """Turns alone: what was computed, without waits and values."""
    return [entry for entry in log if "wait" not in entry and "got" not in entry]


def test_two_passes_take_turns():
    log: list[str] = []
    drive(in_turns([numbered(log, "a", 3), numbered(log, "b", 4)]))
    assert work(log) == ["a0", "b0", "a1", "b1", "a2", "b2", "a ends", "b3", "b ends"]
    assert log[:8] == [
        *("a0", "b0"),  # both are under way before either is waited for
        *("wait a0", "a got a0", "a1"),
        *("wait b0", "b got b0", "b1"),
    ]


def test_a_value_is_waited_for_when_its_pass_has_its_next_turn_and_no_earlier():
    log: list[str] = []
    drive(in_turns([numbered(log, "a", 3), numbered(log, "b", 3)]))
    for name, turn in product("ab", range(3)):
        at = log.index(f"wait {name}{turn}")
        assert log[at + 1] == f"{name} got {name}{turn}", "and it goes to the pass that asked"


def test_one_pass_alone_runs_as_it_is():
    alone, among = [], []
    drive(numbered(alone, "a", 3))
    drive(in_turns([numbered(among, "a", 3)]))
    assert among == alone


def test_a_pause_ends_a_turn_and_a_value_that_is_here_does_not():
    log: list[str] = []

    def body(name: str) -> Pass[None]:
        log.append(f"{name}0")
        assert (yield PAUSE) is None
        log.append(f"{name}1")
        yield Recorded(log, f"{name} weight", cover=0)
        log.append(f"{name}2")

    drive(in_turns([body("a"), body("b")]))
    assert work(log) == ["a0", "b0", "a1", "a2", "b1", "b2"]


@given(turns=st.tuples(st.integers(0, 6), st.integers(0, 6)))
@settings(deadline=None)
def test_a_pass_that_ends_early_leaves_the_turns_to_the_other(turns):
    log: list[str] = []
    assert drive(in_turns([numbered(log, "a", turns[0]), numbered(log, "b", turns[1])])) is None
    for name, count in zip("ab", turns, strict=True):
        mine = [entry for entry in log if entry.replace("wait ", "").startswith(name)]
        alone: list[str] = []
        drive(numbered(alone, name, count))
        assert mine == alone, "each runs whole and in its own order"


def test_the_turns_cover_deferred_weight_gradients_like_any_pass():
    log: list[str] = []
    queue = WgradQueue()
    for name in ("w1", "w2", "w3"):
        queue.defer(partial(log.append, name))
    drive(in_turns([numbered(log, "a", 1), numbered(log, "b", 1)]), queue)
    waits = [entry for entry in log if entry.startswith(("w1", "w2", "w3", "wait"))]
    assert waits == ["w1", "wait a0", "w2", "wait b0", "w3"]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_one_of_two_passes_reaches_the_caller(failing):
    log: list[str] = []

    def body() -> Pass[None]:
        yield Recorded(log, "x")
        raise ZeroDivisionError

    passes = [numbered(log, "a", 5), numbered(log, "b", 5)]
    passes[failing] = body()
    with pytest.raises(ZeroDivisionError):
        drive(in_turns(passes))
    assert not any("ends" in entry for entry in log)


def test_an_error_of_a_wait_reaches_the_caller():
    class Broken(Recorded):
        def wait(self) -> object:
            raise ConnectionError

    def body() -> Pass[None]:
        yield Broken([], "x")

    with pytest.raises(ConnectionError):
        drive(in_turns([numbered([], "a", 3), body()]))


def test_turns_nest():
    """A pass may itself consist of passes that take turns, as a layer's do in a model's."""
    log: list[str] = []

    def model() -> Pass[str]:
        yield from in_turns([numbered(log, "a", 2), numbered(log, "b", 2)])
        yield from in_turns([numbered(log, "c", 1), numbered(log, "d", 1)])
        return "done"

    assert drive(model()) == "done"
    assert work(log)[-4:] == ["c0", "d0", "c ends", "d ends"]
    assert log.index("b ends") < log.index("c0")
