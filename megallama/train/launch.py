"""Starts a job's work: in this process where it is alone or a launcher started it, else in local
workers."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from megallama.errors import EXIT_LOST, ConfigError, UserError
from megallama.train.local_worker import Work
from megallama.train.process import ALONE, Process, connect, find_place
from megallama.train.signals import StopSignals
from megallama.train.supervisor import supervise

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

#: How long a failing process waits for the store to say whether another one reported the same.
ANSWER_SECONDS = 5.0


def launch(nproc: int, work: Work) -> int:
    """Do `work` in as many processes as the launcher or `nproc` says; return the exit code.

    Signals set a flag from here on: before torch, which takes seconds to import. The exit code is
    right in every process of a launcher, but an error that several of them meet is printed by the
    first alone: the others return its code.

    Raises:
        ConfigError: `nproc` is below 1 or was given under a launcher, whose variables may also be
            malformed.
        LostError: a process was killed, or the launcher's store does not answer.
        UserError: whatever `work` raises.
    """
    if nproc < 1:
        raise ConfigError(f"--nproc {nproc}: at least 1 process is needed")
    place = find_place(os.environ)
    if place and nproc > 1:
        raise ConfigError(
            f"--nproc {nproc}: a launcher already started {place.size} processes; leave --nproc "
            "out under torchrun and srun"
        )
    if nproc > 1:
        return supervise(nproc, work)
    with StopSignals() as stop:
        if place is None:
            return work(ALONE, stop)
        return _work_under_launcher(connect(place), stop, work)


def _work_under_launcher(process: Process, stop: StopSignals, work: Work) -> int:
    """`work`, with every distinct error printed once a job: 2048 equal lines would hide the rest.

    Where the store does not answer, one process a node prints.
    """
    try:
        return work(process, stop)
    except UserError as error:
        first = process.store is None or _is_first(process.store, error)
        if not (process.local_rank == 0 if first is None else first):
            return error.exit_code
        if process.rank:
            error.args = (f"rank {process.rank}: {error}",)
        raise


def _is_first(store: Store, error: UserError) -> bool | None:
    """Whether this process is the first to report `error`; None if the store does not say.

    Losses count as one error: each rank names the peer that it lost, and they follow from each
    other.
    """
    message = "lost" if error.exit_code == EXIT_LOST else str(error)
    answers: list[int] = []

    def ask() -> None:
        with suppress(RuntimeError):  # the host of the store is gone
            answers.append(store.add(f"megallama/error/{message}", 1))

    # The call has no time limit of its own, and a host that lost its power refuses nothing.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return answers[0] == 1 if answers else None
