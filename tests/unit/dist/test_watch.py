"""Who is found missing, and what a store that is gone or hangs does to it."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from torch.distributed import FileStore

from megallama.dist import watch
from megallama.dist.link import Link
from megallama.dist.watch import Wait, Watch, missing
from megallama.errors import LostError


def wait(rank: int, peer: int, failed: bool = False) -> Wait:
    return Wait(rank, peer, f"to send x{peer}", f"pipeline {peer}>{rank}", failed)


@pytest.mark.parametrize(
    "said, expected",
    [
        ([], []),
        ([wait(0, 1, failed=True)], [(1, 0)]),
        # The chain's end, whoever failed first.
        ([wait(0, 1, failed=True), wait(1, 2), wait(2, 3)], [(3, 2)]),
        ([wait(2, 3, failed=True), wait(1, 2), wait(0, 1)], [(3, 2)]),
        ([wait(2, 3, failed=True), wait(1, 2, failed=True)], [(3, 2)]),
        # Two neighbours of one missing rank: the first to speak is heard.
        ([wait(2, 1, failed=True), wait(0, 1, failed=True)], [(1, 2)]),
        # Two missing ranks.
        ([wait(5, 4, failed=True), wait(0, 1, failed=True), wait(1, 2)], [(2, 1), (4, 5)]),
        # Rank 4 is slow. Who waits for it only heard of the loss of rank 1.
        ([wait(0, 1, failed=True), wait(3, 4)], [(1, 0)]),
        # A circle, entered from outside, and one of a single pair.
        ([wait(0, 1, failed=True), wait(1, 2), wait(2, 3), wait(3, 1)], []),
        ([wait(0, 1, failed=True), wait(1, 0, failed=True)], []),
    ],
)
def test_the_rank_at_the_end_of_a_chain_is_missing(said, expected):
    assert [(end.peer, end.rank) for end in missing(said)] == expected


class Connections:
    """Stands for a gloo backend whose peers are gone."""

    def __init__(self) -> None:
        self.broken_off = 0

    def recv(self, *_: object) -> None:
        self.broken_off += 1
        raise RuntimeError("gone")


def lose(own: Watch) -> tuple[LostError, LostError, int]:
    """Rank 2 of ranks 2 and 7 loses the other: the first error, the final one, and how often it
    broke off."""
    connections = Connections()
    link = Link(connections, "pipeline 7>2", 0, [2, 7])
    link.complete("to take part in all_reduce")
    link.complete("to send w")
    vigil = own.over(link)
    error = link.lost(1, "to send x", "Connection closed by peer. And more")
    return error, vigil.explain(error), connections.broken_off


def test_the_verdict_names_the_peer_and_what_it_owed(tmp_path, monkeypatch):
    store = FileStore(str(tmp_path / "store"))
    own = Watch(store, 2, timedelta(seconds=5))
    own.step = 41
    monkeypatch.setattr("socket.gethostname", lambda: "there")
    Watch(store, 7, timedelta(seconds=5)).announce()
    _, error, broken_off = lose(own)
    assert str(error) == (
        "rank 7 is lost (host there): rank 2 waited for it to send x (group 'pipeline 7>2', which "
        "completed 2 operations, the last 'send w'; last step 41); try again"
    )
    assert (error.peer, error.owed, error.exit_code, broken_off) == (7, "to send x", 69, 1)
    # Whoever loses a peer later ends with the same words.
    late, later = Watch(store, 3, timedelta(seconds=5)), LostError("", peer=2, owed="to take y")
    assert late.others_gave_up()
    assert str(late.lose(later, "data", failed=True)) == str(error).replace(
        "is rank 2", "is rank 3"
    )


def test_nobody_gave_up_in_a_fresh_store(tmp_path):
    assert not Watch(FileStore(str(tmp_path / "store")), 0, timedelta(1)).others_gave_up()


def test_where_the_first_to_speak_ends_at_once_the_others_find_for_themselves(tmp_path):
    store = FileStore(str(tmp_path / "store"))
    assert watch._say(watch.PrefixStore("watch", store), wait(9, 8, failed=True)) == 1
    error = Watch(store, 2, timedelta(1)).lose(LostError("", peer=9, owed="to take y"), "g", False)
    assert str(error).startswith("rank 8 is lost: rank 9 waited for it to send x8 (group")


class Hanging:
    """A store whose host was stopped."""

    def __init__(self, *_: object) -> None:
        self.asked = 0

    def _hang(self, *_: object) -> int:
        self.asked += 1
        threading.Event().wait(60)
        return 0

    add = check = _hang


class Failing:
    """A store whose host is gone."""

    def __init__(self, *_: object) -> None:
        pass

    def _fail(self, *_: object) -> int:
        raise RuntimeError("Broken pipe")

    add = check = _fail


@pytest.mark.parametrize("store", [Hanging, Failing, None])
def test_without_an_answer_from_the_store_the_first_error_stands(store, monkeypatch, tmp_path):
    if store is not None:
        monkeypatch.setattr(watch, "PrefixStore", store)
        monkeypatch.setattr(watch, "ANSWER", 0.1)
    own = Watch(FileStore(str(tmp_path / "store")) if store else None, 2, timedelta(seconds=5))
    assert not own.others_gave_up()
    first, final, broken_off = lose(own)
    assert final is first
    assert broken_off == 1
    assert str(first) == (
        "group 'pipeline 7>2': rank 2 waited for rank 7 to send x, and it was lost or gave up "
        "(Connection closed by peer); try again"
    )
    if store is Hanging:
        assert own._store.asked == 1, "one question at a time"
