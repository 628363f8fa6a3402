"""Meetings: one answer or one error for every process. Threads stand for the processes."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from torch import AcceleratorError
from torch.distributed import HashStore, PrefixStore, TCPStore

from megallama.errors import ConfigError, CorruptError, LostError, UserError
from megallama.train import meeting
from megallama.train.meeting import Meeting
from megallama.train.process import ALONE, Process

SIZE = 3
Connect = Callable[[int], Any]


@pytest.fixture(scope="module")
def clients() -> list[TCPStore]:
    """A server's own client, then others: made once, since each may wait for a name server."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    others = [TCPStore("127.0.0.1", server.port, wait_for_workers=False) for _ in range(SIZE - 1)]
    return [server, *others]


@pytest.fixture(params=["hash", "tcp"])
def connect(request: pytest.FixtureRequest, clients: list[TCPStore]) -> Connect:
    """The store of a job as a rank has it: the same object, or a client of its own."""
    if request.param == "hash":
        shared = HashStore()
        return lambda rank: shared
    return lambda rank: PrefixStore(request.node.name, clients[rank])


def together(connect: Connect, body: Callable[[Meeting], Any]) -> list[Any]:
    """What `body` returns or raises in each process, by rank."""

    def live(rank: int) -> Any:
        try:
            return body(Meeting(Process(rank, SIZE, rank, SIZE, connect(rank), None)))
        except Exception as error:
            return error

    with ThreadPoolExecutor(SIZE) as threads:
        return list(threads.map(live, range(SIZE)))


def described(results: list[Any]) -> list[tuple[type, str]]:
    return [(type(result), str(result)) for result in results]


def test_the_conclusion_is_drawn_once_from_the_results_by_rank(connect: Connect) -> None:
    drawn: list[list[str]] = []

    def conclude(ranks: Any) -> str:
        drawn.append(list(ranks))
        return "+".join(ranks)

    def body(here: Meeting) -> str:
        time.sleep(0.02 * (SIZE - here.process.rank))  # rank 0 is the last to come
        return here.hold(lambda: f"of {here.process.rank}", conclude)

    assert together(connect, body) == ["of 0+of 1+of 2"] * SIZE
    assert drawn == [["of 0", "of 1", "of 2"]]


def test_without_a_conclusion_the_answer_is_rank_0_s(connect: Connect) -> None:
    assert together(connect, lambda m: m.hold(lambda: f"ö {m.process.rank}")) == ["ö 0"] * SIZE
    assert together(connect, lambda m: m.leads) == [True, False, False]


@pytest.mark.parametrize("failing", [{0}, {2}, {1, 2}, {0, 1, 2}], ids=str)
@pytest.mark.parametrize("kind", [ConfigError, CorruptError, UserError])
def test_an_error_of_one_is_every_ones(
    connect: Connect, failing: set[int], kind: type[UserError]
) -> None:
    """The lowest rank's, with its exit code; the meeting after it is an ordinary one."""

    def body(here: Meeting) -> tuple[tuple[type, str, int], str]:
        def do() -> str:
            if here.process.rank in failing:
                raise kind(f"rank {here.process.rank}: no spaß")
            return "fine"

        with pytest.raises(UserError) as caught:
            here.hold(do)
        error = caught.value
        return (type(error), str(error), error.exit_code), here.hold(lambda: "next")

    expected = (kind, f"rank {min(failing)}: no spaß", kind.exit_code)
    assert together(connect, body) == [(expected, "next")] * SIZE


def test_a_gpu_that_fails_in_a_meeting_is_named_to_all(connect: Connect) -> None:
    """Though the lowest rank says something that follows from it."""

    def body(here: Meeting) -> str:
        def do() -> str:
            if here.process.rank == 2:
                raise AcceleratorError("CUDA error: unspecified launch failure\nMore")
            raise LostError("a NCCL operation failed", follows=True)

        return here.hold(do)

    errors = together(connect, body)
    host = socket.gethostname()
    line = f"the GPU of rank 2 (host {host}) failed: CUDA error: unspecified launch failure"
    assert described(errors) == [(LostError, f"{line}; try again without that machine")] * SIZE
    assert not any(error.follows for error in errors)


def test_what_follows_from_another_s_end_still_does_where_it_is_heard(connect: Connect) -> None:
    def body(here: Meeting) -> str:
        def do() -> str:
            raise LostError(f"rank {here.process.rank} lost it", peer=9)

        return here.hold(do)

    errors = together(connect, body)
    assert [(str(error), error.follows) for error in errors] == [("rank 0 lost it", True)] * SIZE


def test_an_error_of_the_conclusion_is_every_ones(connect: Connect) -> None:
    def refuse(ranks: Any) -> str:
        raise ConfigError(f"{ranks[1]} is not {ranks[0]}")

    results = together(connect, lambda m: m.hold(lambda: f"{m.process.rank}", refuse))
    assert described(results) == [(ConfigError, "1 is not 0")] * SIZE


def test_rounds_do_not_mix(connect: Connect) -> None:
    """However late a process is for one, it gets that one's answer."""

    def body(here: Meeting) -> list[str]:
        generator, answers = random.Random(here.process.rank), []
        for turn in range(20):
            time.sleep(generator.choice([0, 0, 0.003]))
            mine = f"{turn}.{here.process.rank}"
            answers.append(here.hold(lambda mine=mine: mine, ",".join))
        return answers

    expected = [",".join(f"{turn}.{rank}" for rank in range(SIZE)) for turn in range(20)]
    assert together(connect, body) == [expected] * SIZE


def test_what_the_ranks_said_does_not_stay_in_the_store(connect: Connect) -> None:
    """A checkpoint's texts are megabytes at 2048 ranks."""
    together(connect, lambda m: [m.hold(lambda: "x" * 100) for _ in range(5)])
    store = connect(0)
    for turn in range(5):
        for rank in range(SIZE):
            assert store.check([f"megallama/train/{turn}"]) == (turn == 4), "the last answer stays"
            assert not store.check([f"megallama/train/{turn}/{rank}"])


def test_a_process_that_does_not_come_is_lost_to_the_others(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "PATIENCE", timedelta(seconds=0.3))

    def body(here: Meeting) -> str:
        return "away" if here.process.rank == 1 else here.hold(lambda: "here")

    results = together(connect, body)
    assert results[1] == "away"
    for rank in (0, 2):
        assert isinstance(results[rank], LostError)
        assert str(results[rank]).startswith(f"rank {rank}: another rank did not come (")
        assert str(results[rank]).endswith("; try again")
        assert results[rank].exit_code == 69


def test_a_bug_is_no_answer(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised where it is; the others find that the process did not come."""
    monkeypatch.setattr(meeting, "PATIENCE", timedelta(seconds=0.3))
    results = together(connect, lambda m: m.hold(lambda: f"{1 // (2 - m.process.rank)}"))
    assert [type(result) for result in results] == [LostError, LostError, ZeroDivisionError]


def test_rank_0_is_the_last_to_leave(connect: Connect) -> None:
    left: list[int] = []

    def body(here: Meeting) -> None:
        time.sleep(0.03 * here.process.rank)
        if here.process.rank:
            left.append(here.process.rank)
        here.adjourn()
        if here.leads:
            left.append(0)

    assert together(connect, body) == [None] * SIZE
    assert left == [1, 2, 0]


def test_a_process_that_never_leaves_is_not_waited_for_for_ever(connect: Connect) -> None:
    def body(here: Meeting) -> None:
        if here.process.rank != 2:
            here.adjourn(timedelta(seconds=0.2))

    assert together(connect, body) == [None] * SIZE


def test_series_of_meetings_do_not_mix(connect: Connect) -> None:
    def body(here: Meeting) -> tuple[str, str]:
        other = Meeting(here.process, "other")
        return here.hold(lambda: "a"), other.hold(lambda: "b")

    assert together(connect, body) == [("a", "b")] * SIZE


def test_an_error_that_all_raise_says_so(connect: Connect) -> None:
    def refuse() -> str:
        raise ConfigError("no")

    assert all(error.shared for error in together(connect, lambda m: m.hold(refuse)))


def test_alone_there_is_nobody_to_meet() -> None:
    here = Meeting(ALONE)
    assert here.leads
    assert here.hold(lambda: "mine") == "mine"
    assert here.hold(lambda: "mine", lambda ranks: f"{len(ranks)} {ranks[0]}") == "1 mine"
    here.adjourn()

    def refuse() -> str:
        raise CorruptError("a.bin: cut")

    with pytest.raises(CorruptError, match=r"^a\.bin: cut$"):
        here.hold(refuse)


def test_every_error_that_a_process_may_meet_travels() -> None:
    """By its name: all of them are in one module."""
    pending, found = [UserError], set()
    while pending:
        kind = pending.pop()
        found.add(kind)
        pending += kind.__subclasses__()
    for kind in found:
        with pytest.raises(kind) as caught:
            together_or_raise(kind)
        assert type(caught.value) is kind


def together_or_raise(kind: type[UserError]) -> None:
    def refuse() -> str:
        raise kind("why")

    Meeting(ALONE).hold(refuse)
