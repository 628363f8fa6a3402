"""Signs of life: a thread of every process counts in the job's store, whatever else it waits for.

Ranks that meet wait for the slowest, who may be writing a checkpoint to a slow disk. That one is
told from one that is stopped or gone by its signs: the time limit is for silence, not for slowness.
Who is silent is judged by the clock of the one who waits, from when it began to wait.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from megallama.errors import LostError
from megallama.train.process import STORE_TIMEOUT, Process

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

#: The longest time between two signs, in seconds: 2,048 processes are 70 a second for the store.
INTERVAL = 30.0
#: Seconds from one look at those who are waited for to the next.
LOOK = 0.5


@dataclass(frozen=True)
class Sign:
    """What a process says of itself: its host, and the last step that it did."""

    count: int
    host: str
    step: int


class Pulse:
    """This process's signs, while entered, and the watch over the others'.

    `silence`: seconds without a sign after which a process is lost. One that has given none yet may
    still be starting, and has as long as the store.
    """

    def __init__(self, process: Process, silence: float) -> None:
        self.rank, self.silence = process.rank, silence
        #: The last step that this process did.
        self.step = 0
        # A connection of its own: who waits in one keeps every other thread from it.
        self._store: Store | None = process.store and process.store.clone()  # type: ignore[attr-defined]
        self._interval = min(silence / 4, INTERVAL)
        self._watches: list[Watch] = []
        self._over, self._wake = False, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._answered = time.monotonic()

    def __enter__(self) -> Pulse:
        if self._store is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Not waited for: it may hang in a store whose host is stopped.
        self._over = True
        self._wake.set()

    def watch(self, ranks: Sequence[int]) -> Watch:
        """Begin to watch ranks; `unwatch` ends it."""
        watch = Watch(ranks, self.silence)
        self._answered = time.monotonic()
        self._watches.append(watch)
        self._wake.set()
        return watch

    def unwatch(self, watch: Watch) -> None:
        self._watches.remove(watch)

    def outlast(self, thread: threading.Thread, watch: Watch, what: str) -> None:
        """Wait until a thread ended that waits for the ranks of `watch` to do `what`.

        Raises:
            LostError: one of them is silent, or the store is.
        """
        while thread.is_alive():
            thread.join(LOOK)
            if thread.is_alive():
                if lost := watch.missing():
                    raise watch.error(what, lost)
                if time.monotonic() - self._answered > self.silence + LOOK:
                    raise LostError(
                        f"rank {self.rank}: the job's store, which rank 0 or the launcher hosts, "
                        f"does not answer for {self.silence:g} s ({what}); try again",
                        follows=True,
                    )

    def _beat(self) -> None:
        assert self._store is not None
        count, host, due = 0, socket.gethostname(), 0.0
        while not self._over:
            with suppress(RuntimeError):  # torch's errors of a store: who waits in it finds out
                if time.monotonic() >= due:
                    due = time.monotonic() + self._interval
                    count += 1
                    sign = Sign(count, host, self.step)
                    self._store.set(_key(self.rank), json.dumps(asdict(sign)))
                for watch in list(self._watches):
                    watch.look(self._store)
            self._answered = time.monotonic()
            wait = due - self._answered
            self._wake.wait(max(0.0, min(wait, LOOK) if self._watches else wait))
            self._wake.clear()


class Watch:
    """Ranks that are waited for: their last signs, and when each came.

    `lost`: those that are silent, with their last sign where they gave one. Another dict each time
    that it changes: another thread reads it.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        silence: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ranks, self.silence, self._clock = list(ranks), silence, clock
        self.lost: dict[int, Sign | None] = {}
        self._signs: dict[int, str] = {}
        began = clock()
        self._heard = dict.fromkeys(self.ranks, began)

    def look(self, store: Store) -> None:
        """Read the signs, and judge who is lost."""
        there = [r for r in self.ranks if r in self._signs or store.check([_key(r)])]
        signs = store.multi_get([_key(r) for r in there]) if there else []
        now = self._clock()
        for rank, raw in zip(there, signs, strict=True):
            if self._signs.get(rank) != (text := raw.decode()):
                self._signs[rank], self._heard[rank] = text, now
        starting = max(self.silence, STORE_TIMEOUT.total_seconds())
        self.lost = {
            rank: Sign(**json.loads(self._signs[rank])) if rank in self._signs else None
            for rank in self.ranks
            if now - self._heard[rank] > (self.silence if rank in self._signs else starting)
        }

    def heard_out(self, rank: int) -> None:
        """This one is not waited for any more."""
        self.ranks = [other for other in self.ranks if other != rank]

    def missing(self) -> dict[int, Sign | None]:
        """Those who are lost and did not come after all: the pulse's thread judges others later."""
        return {rank: sign for rank, sign in self.lost.items() if rank in self.ranks}

    def error(self, what: str, lost: Mapping[int, Sign | None]) -> LostError:
        """The error for those who are lost, the same words whoever finds it."""
        found = "; ".join(self._line(rank, sign, what) for rank, sign in sorted(lost.items()))
        error = LostError(f"{found}; try again", peer=min(lost), owed=what)
        error.shared = True
        return error

    def _line(self, rank: int, sign: Sign | None, what: str) -> str:
        if sign is None:
            return f"rank {rank} is lost: it gave no sign of life, and is waited for ({what})"
        return (
            f"rank {rank} is lost (host {sign.host}): no sign of life for {self.silence:g} s, and "
            f"it is waited for ({what}; last step {sign.step})"
        )


def _key(rank: int) -> str:
    return f"megallama/alive/{rank}"
