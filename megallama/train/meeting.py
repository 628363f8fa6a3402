"""Where all processes of a job come together and leave with one answer, or all with one error.

For what happens seldom: starting, saving. What happens every step is a collective.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from megallama import errors
from megallama.errors import LostError, UserError
from megallama.train.process import Process
from megallama.train.pulse import Pulse

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

#: The longest that a process waits for the slowest of the others, who may be writing a checkpoint.
PATIENCE = timedelta(minutes=60)


def _first(results: Sequence[str]) -> str:
    return results[0]


class Meeting:
    """The meetings of one process, in the order in which every process holds them.

    `name` keeps one series of meetings apart from another. With `pulse` a process that is silent
    for its time limit is lost to the others; without, or while it gives signs, after `PATIENCE`.
    """

    def __init__(self, process: Process, name: str = "train", pulse: Pulse | None = None) -> None:
        self.process, self.name, self.pulse = process, name, pulse
        self._round = 0
        # Who gives up leaves a thread behind that waits there: the job's store stays usable.
        self._waiting: Store | None = process.store
        if pulse is not None and process.store is not None:
            self._waiting = process.store.clone()  # type: ignore[attr-defined]

    def did(self, step: int) -> None:
        """This process did a step: what is said of it should it be lost."""
        if self.pulse is not None:
            self.pulse.step = step

    @property
    def leads(self) -> bool:
        """Whether this process is the one that speaks and writes for all."""
        return self.process.rank == 0

    def hold(self, do: Callable[[], str], conclude: Callable[[Sequence[str]], str] = _first) -> str:
        """Every process does `do`; rank 0 draws the conclusion that all of them return.

        `conclude` is given the results by rank. Without it the answer is rank 0's own result.

        Raises:
            UserError: one that any process met, on every process: the lowest rank's, of those that
                follow from another's end only where there are no others.
            LostError: a process did not come.
        """
        place = self._place(self._round)
        self._round += 1
        try:
            answer = _attempt(do, self.process)
        except BaseException as error:
            self._tell(place, _bug(self.process.rank, error))
            raise
        if self.process.store is None:
            return conclude(_results([answer]))
        self._tell(place, answer)
        if self.leads:
            self._conclude(place, conclude)
        return _results(self._hear([place], [0]))[0]

    def adjourn(self, patience: timedelta = PATIENCE) -> None:
        """Leave, rank 0 last: it may be the host of the store that the others still read from.

        Who does not come within `patience` is not waited for any longer.
        """
        store, rank = self.process.store, self.process.rank
        if store is None:
            return
        with suppress(RuntimeError):  # torch's errors of a store
            if not self.leads:
                store.set(f"megallama/left/{rank}", "")
                return
            for other in range(1, self.process.size):
                store.wait([f"megallama/left/{other}"], patience)

    def _place(self, number: int) -> str:
        return f"megallama/{self.name}/{number}"

    def _conclude(self, place: str, conclude: Callable[[Sequence[str]], str]) -> None:
        """What rank 0 does: hear all, and answer."""
        store = self.process.store
        assert store is not None
        ranks = range(self.process.size)
        said = [f"{place}/{rank}" for rank in ranks]
        try:
            answers = self._hear(said, ranks)
        except LostError as error:
            if error.shared:  # it names who is missing: the others wait for this rank
                store.set(place, _failure(error))
            raise
        for key in said:
            store.delete_key(key)
        if self._round > 1:  # all are here, so all have read the answer before
            store.delete_key(self._place(self._round - 2))
        try:
            conclusion = _attempt(lambda: conclude(_results(answers)), self.process)
        except BaseException as error:
            store.set(place, _bug(0, error))
            raise
        store.set(place, conclusion)

    def _tell(self, place: str, answer: str) -> None:
        if self.process.store is not None:
            with suppress(RuntimeError):  # the store is gone: `_hear` finds out
                self.process.store.set(f"{place}/{self.process.rank}", answer)

    def _hear(self, keys: Sequence[str], ranks: Sequence[int]) -> list[str]:
        """What other processes wrote, each its key.

        Raises:
            LostError: one did not within `PATIENCE`, or is silent, or the store is gone.
        """
        pulse, heard, failures = self.pulse, list[str](), list[RuntimeError]()
        watch = pulse.watch(ranks) if pulse else None

        def listen() -> None:
            store = self._waiting
            assert store is not None
            try:
                for key, rank in zip(keys, ranks, strict=True):
                    store.wait([key], PATIENCE)
                    heard.append(store.get(key).decode())
                    if watch:
                        watch.heard_out(rank)
            except RuntimeError as error:  # torch's errors of a store
                failures.append(error)

        if pulse is None or watch is None:
            listen()
        else:
            thread = threading.Thread(target=listen, name=f"hear {keys[0]}", daemon=True)
            thread.start()
            try:
                pulse.outlast(thread, watch, f"meeting {keys[0]}")
            finally:
                pulse.unwatch(watch)
        if failures:
            raise LostError(
                f"rank {self.process.rank}: another rank did not come ({failures[0]}); try again",
                follows=True,
            ) from failures[0]
        return heard


def _attempt(do: Callable[[], str], process: Process) -> str:
    """The result or the error of `do`, as text for the other processes: a GPU that fails is named
    to all of them."""
    from megallama.train.failures import explained_loss  # torch: it is there by the first meeting

    try:
        with explained_loss(process):
            return json.dumps({"result": do()})
    except UserError as error:
        return _failure(error)


def _bug(rank: int, error: BaseException) -> str:
    """What a process that ends with a traceback leaves to the others."""
    return _failure(LostError(f"rank {rank} failed: {error!r}", follows=True))


def _failure(error: UserError) -> str:
    fields = {"error": type(error).__name__, "message": str(error), "follows": error.follows}
    return json.dumps(fields)


def _results(answers: Sequence[str]) -> list[str]:
    """The results by rank, or else the lowest rank's error: of a fault that follows from no other,
    where there is one."""
    said = [json.loads(answer) for answer in answers]
    faults = [fields for fields in said if "error" in fields]
    if faults:
        fault = min(faults, key=lambda fields: bool(fields["follows"]))
        error: UserError = getattr(errors, fault["error"])(fault["message"])
        error.shared, error.follows = True, fault["follows"]
        raise error
    return [fields["result"] for fields in said]
