"""Who is really missing, where ranks wait for ranks that only wait for others.

A rank that lost a peer says in the job's store for whom it waited and for what, and so does then
every rank that waits. Who is waited for and says nothing is missing. The first rank to speak hears
the others out and writes the verdict, so that all ranks end with the same one.

The store is asked nothing in waits shorter than `LOOK`. Each question to it has a thread and a time
limit, for a store may be lost with its host; then each rank names the peer for which it waited.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import TypeVar

from megallama.dist.compat import PrefixStore, Store
from megallama.dist.link import Link
from megallama.errors import LostError

T = TypeVar("T")

#: Seconds of waiting after which a rank looks whether another one gave up, and then how often.
LOOK = 0.25
#: Seconds that the ranks have to say for whom they wait: four looks.
GRACE = 1.0
#: Seconds that the store has to answer.
ANSWER = 1.0


@dataclass(frozen=True)
class Wait:
    """Global rank `rank` waits for `peer` `owed` ("to send x") in `group`.

    `failed`: the wait ended in an error, so the peer is lost unless it waits for another itself.
    `done`: what the group completed last, `step`: the last step that `rank` did, and with it all
    others. `host`: the peer's.
    """

    rank: int
    peer: int
    owed: str
    group: str
    failed: bool
    done: str = "none"
    step: int = 0
    host: str = ""

    def text(self) -> str:
        host = f" (host {self.host})" if self.host else ""
        return (
            f"rank {self.peer} is lost{host}: rank {self.rank} waited for it {self.owed} "
            f"(group {self.group!r}, which completed {self.done}; last step {self.step})"
        )


def missing(said: Sequence[Wait]) -> list[Wait]:
    """The ends of the chains that begin with a failed wait: waits for ranks that say nothing.

    One for each missing rank, in rank order. Ranks that wait in a circle miss nobody.
    """
    of_rank = {wait.rank: wait for wait in said}
    ends: dict[int, Wait] = {}
    for wait in (wait for wait in said if wait.failed):
        passed: set[int] = set()
        while wait.peer in of_rank and wait.peer not in passed:
            wait = of_rank[wait.peer]
            passed.add(wait.rank)
        if wait.peer not in of_rank:
            ends.setdefault(wait.peer, wait)
    return [ends[peer] for peer in sorted(ends)]


class Watch:
    """What a process's groups know together of ranks that are lost. One thread waits in them.

    `timeout`: seconds that this rank waits for an operation; see `connect`.
    """

    def __init__(self, store: Store | None, rank: int, timeout: timedelta) -> None:
        self.rank, self.timeout = rank, timeout.total_seconds()
        #: By group name, the seconds that the thread which computes has waited for others.
        self.waits: dict[str, float] = {}
        #: The last step that this process did.
        self.step = 0
        self._store = None if store is None else PrefixStore("watch", store)
        self._asking = threading.Thread()
        self._links: list[Link] = []
        self._found: list[Wait] | None = None

    @property
    def waited(self) -> float:
        """Seconds that the thread which computes has waited for others, in all groups."""
        return sum(self.waits.values())

    def over(self, link: Link) -> Vigil:
        """The waits of one group."""
        self._links.append(link)
        return Vigil(self, link)

    def announce(self) -> None:
        """Tell all ranks where this one runs."""
        host = socket.gethostname()
        self._ask(lambda store: store.set(_host(self.rank), host), ANSWER)

    def others_gave_up(self) -> bool:
        """Whether a rank said that it lost another."""
        return bool(self._ask(lambda store: store.check([_place(1)]), ANSWER))

    def lose(self, error: LostError, group: str, failed: bool, done: str = "none") -> LostError:
        """Give up because of `error`, in `group`, which completed `done`: the error that names who
        is missing.

        `error` itself where that is not found out.
        """
        if self._found is None:
            assert error.peer is not None
            wait = Wait(self.rank, error.peer, error.owed, group, failed, done, self.step)
            number = self._ask(lambda store: _say(store, wait), ANSWER)
            # Not before others can read why. Then they need not wait for what this rank owes them.
            for link in self._links:
                link.break_off()
            self._found = self._ask(lambda store: _verdict(store, number == 1), GRACE + ANSWER)
            self._found = self._found or []
        if not self._found:
            return error
        first, lines = self._found[0], "; ".join(wait.text() for wait in self._found)
        lost = LostError(f"{lines}; try again", peer=first.peer, owed=first.owed)
        lost.shared = True  # every rank ends with the same words
        return lost

    def _ask(self, question: Callable[[Store], T], seconds: float) -> T | None:
        """The store's answer; None where it fails, takes longer, or still owes an earlier one."""
        store, answers = self._store, []
        if store is None or self._asking.is_alive():
            return None

        def ask(store: Store = store) -> None:
            with suppress(RuntimeError):  # torch's errors of a store
                answers.append(question(store))

        # The calls have no time limit of their own, and a stopped host refuses nothing.
        self._asking = threading.Thread(target=ask, name="watch", daemon=True)
        self._asking.start()
        self._asking.join(seconds)
        return answers[0] if answers else None


class Vigil:
    """The waits for one group's operations."""

    def __init__(self, watch: Watch, link: Link) -> None:
        self._watch, self._link = watch, link

    def outlast(self, ended: threading.Event) -> None:
        """Wait until an operation ended, for `Watch.timeout` at most.

        Raises:
            LostError: it did not, or another rank lost one and all give up.
        """
        watch, link = self._watch, self._link
        began = time.monotonic()
        deadline = began + watch.timeout
        while not ended.wait(min(LOOK, max(deadline - time.monotonic(), 0.01))):
            late, waiting = time.monotonic() >= deadline, link.waiting
            if waiting is not None and (late or watch.others_gave_up()):
                reason = f"no answer within {watch.timeout:g} s" if late else "another rank gave up"
                error = link.lost(*waiting, reason)
                raise watch.lose(error, link.name, late, link.done)
        watch.waits[link.name] = watch.waits.get(link.name, 0.0) + time.monotonic() - began

    def explain(self, error: LostError) -> LostError:
        """The error to show for an operation that failed with `error`."""
        if self._link.closed:  # by this rank: nobody is lost
            return error
        return self._watch.lose(error, self._link.name, True, self._link.done)


def _place(number: int) -> str:
    return f"said/{number}"


def _host(rank: int) -> str:
    return f"host/{rank}"


def _say(store: Store, wait: Wait) -> int:
    """Tell all ranks; returns how many spoke so far, this one included."""
    if store.check([_host(wait.peer)]):
        wait = replace(wait, host=store.get(_host(wait.peer)).decode())
    number = store.add("said", 1)
    store.set(_place(number), json.dumps(asdict(wait)))
    return number


def _verdict(store: Store, first: bool) -> list[Wait]:
    """What the first rank to speak finds after `GRACE`.

    Should it end without a word, each of the others finds for itself a little later.
    """
    deadline = time.monotonic() + (GRACE if first else GRACE + ANSWER / 2)
    while time.monotonic() < deadline:
        if store.check(["verdict"]):
            return [Wait(**wait) for wait in json.loads(store.get("verdict"))]
        time.sleep(0.05)
    places = [_place(number) for number in range(1, store.add("said", 0) + 1)]
    found = missing([Wait(**json.loads(store.get(p))) for p in places if store.check([p])])
    if first:
        store.set("verdict", json.dumps([asdict(wait) for wait in found]))
    return found
