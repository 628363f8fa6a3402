"""The pool: ranks meet in their case's store, and a failing, dying or hanging rank ends it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from tests.layouts.pool import Pool, Seat, Task


def exchange(seat: Seat, word: str) -> list[str]:
    seat.store.set(str(seat.rank), f"{word}{seat.rank}")
    return [seat.store.get(str(rank)).decode() for rank in range(seat.size)]


def break_one(seat: Seat, how: str) -> None:
    """Rank 1 fails; the others wait for it."""
    if seat.rank != 1:
        seat.store.get("never")
    elif how == "raise":
        raise ValueError("a planted fault")
    elif how == "die":
        os._exit(7)
    time.sleep(1000)


@pytest.fixture(scope="module")
def small_pool() -> Iterator[Pool]:
    with Pool(4) as pool:
        yield pool


def test_cases_run_side_by_side_and_keep_apart(small_pool):
    tasks = [Task(ranks, exchange, (f"{ranks}-",)) for ranks in (1, 2, 4, 2, 1, 3)]
    outcomes = dict(small_pool.run_all(tasks))
    for number, task in enumerate(tasks):
        answer = [f"{task.ranks}-{rank}" for rank in range(task.ranks)]
        assert outcomes[number].results == [answer] * task.ranks


@pytest.mark.parametrize(
    "how, message",
    [
        ("raise", "rank 1: .*a planted fault"),
        ("die", "rank 1: the process died with exit code 7"),
        ("hang", r"no end after 3 s; ranks \[0, 1, 2\]"),
    ],
)
def test_a_broken_case_is_reported_and_others_go_on(small_pool, monkeypatch, how, message):
    if how == "hang":  # elsewhere nothing but a hang takes so long
        monkeypatch.setattr(small_pool, "seconds", 3)
    tasks = [Task(3, break_one, (how,)), Task(1, exchange, ("a",)), Task(4, exchange, ("b",))]
    outcomes = dict(small_pool.run_all(tasks))
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        assert not outcomes[0].error, outcomes[0].error
    assert outcomes[1].results == [["a0"]]
    assert outcomes[2].results[3] == ["b0", "b1", "b2", "b3"]


def test_more_ranks_than_workers(small_pool):
    with pytest.raises(ValueError, match="5 ranks in a pool of 4"):
        small_pool.run(Task(5, exchange, ("",)))
