"""The first meeting of a job's processes, and which of them print what they end with."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier

import pytest
from torch import AcceleratorError
from torch.distributed import HashStore, Store

from megallama.dist.watch import Wait, Watch
from megallama.errors import ConfigError, LostError, UserError
from megallama.train import launch, meeting, pulse
from megallama.train.failures import explained_loss
from megallama.train.process import Process
from megallama.train.signals import StopSignals


def test_a_rank_that_never_starts_is_named_within_the_store_s_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And not after the hour that a meeting's slowest rank has."""
    monkeypatch.setattr(meeting, "PATIENCE", timedelta(seconds=20))
    monkeypatch.setattr(launch, "LAST_WORDS", timedelta(seconds=0.1))
    for module in (launch, pulse):
        monkeypatch.setattr(module, "STORE_TIMEOUT", timedelta(seconds=1))
    process = Process(0, 2, 0, 1, HashStore(), None)
    with StopSignals() as stop, pytest.raises(LostError) as caught:
        launch._work_under_launcher(process, stop, lambda size: None, lambda *arguments: 0)
    assert str(caught.value) == (
        "rank 1 is lost: it gave no sign of life, and is waited for (meeting megallama/launch/0/0)"
        "; try again"
    )


SIZE = 4
ECC = "CUDA error: uncorrectable ECC error encountered"


def printed(monkeypatch: pytest.MonkeyPatch, store: Store, errors: list[Callable[[], UserError]]):
    """What the ranks print that end with these errors, one after the other, by rank."""
    monkeypatch.setattr(launch, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(launch, "LAST_WORDS", timedelta(seconds=0.1))
    turns = [Barrier(2) for _ in range(SIZE)]  # between a rank and the one before it

    def live(rank: int) -> str | None:
        def work(prepared: None, process: Process, stop: StopSignals) -> int:
            if rank:
                turns[rank].wait()
            raise errors[rank]()

        process = Process(rank, SIZE, rank, SIZE, store, None)
        try:
            code = launch._work_under_launcher(process, StopSignals(), lambda size: None, work)
        except UserError as error:
            code, words = error.exit_code, str(error)
        else:
            words = None
        assert code == errors[rank]().exit_code
        if rank + 1 < SIZE:
            turns[rank + 1].wait()
        return words

    with ThreadPoolExecutor(SIZE) as threads:
        return list(threads.map(live, range(SIZE)))


def lost_peer(rank: int) -> LostError:
    """As `Link.lost` says it, of a rank that could not ask the others."""
    words = f"group 'data': rank {rank} waited for rank 3 to send x, and it was lost or gave up"
    return LostError(words, peer=3, owed="to send x")


def verdict(rank: int) -> LostError:
    """The real words of ranks that agreed on who is missing."""
    watch = Watch(None, rank, timedelta(seconds=1))
    watch._found = [Wait(0, 3, "to send x", "data", True)]
    return watch.lose(LostError("", peer=3), "data", failed=True)


def failed_gpu(rank: int) -> LostError:
    process = Process(rank, SIZE, rank, SIZE, None, None)
    with pytest.raises(LostError) as caught, explained_loss(process):
        raise AcceleratorError(ECC)
    return caught.value


def test_a_fault_of_one_s_own_is_not_hidden_behind_those_who_lost_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However late it is said. And what the others agreed on is told beside it, once."""
    said = printed(
        monkeypatch,
        HashStore(),
        [lambda: lost_peer(0), lambda: verdict(1), lambda: verdict(2), lambda: failed_gpu(3)],
    )
    assert said == [str(lost_peer(0)), str(verdict(1)), None, f"rank 3: {failed_gpu(3)}"]


def test_ranks_that_lost_one_another_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    nccl = LostError("a NCCL operation failed (timeout); try again", follows=True)
    came_not = LostError("rank 1: another rank did not come (x); try again", follows=True)
    said = printed(
        monkeypatch,
        HashStore(),
        [lambda: lost_peer(0), lambda: came_not, lambda: nccl, lambda: lost_peer(3)],
    )
    assert said == [str(lost_peer(0)), None, None, None]


def test_a_rank_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "rank 1: another rank did not come (x); try again"
    errors = [lambda: ConfigError("a"), lambda: LostError(words, follows=True)]
    errors += [lambda: ConfigError("rank 1: is said by 2"), lambda: ConfigError("b")]
    said = printed(monkeypatch, HashStore(), errors)
    assert said == ["a", words, "rank 2: rank 1: is said by 2", "rank 3: b"]


def test_without_a_store_a_fault_of_one_s_own_is_told_by_every_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what follows by one process of a node."""
    monkeypatch.setattr(launch, "_is_first", lambda store, message: None)
    errors = [lambda rank=rank: lost_peer(rank) for rank in range(SIZE - 1)]
    said = printed(monkeypatch, HashStore(), [*errors, lambda: failed_gpu(3)])
    assert said == [str(lost_peer(0)), None, None, f"rank 3: {failed_gpu(3)}"]
