"""Starts a job's work: in this process where it is alone or a launcher started it, else in local
workers."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from megallama.errors import EXIT_CONFIG, ConfigError, UserError, said_by
from megallama.train.local_worker import LAST_WORDS
from megallama.train.meeting import Meeting
from megallama.train.process import (
    ALONE,
    STORE_TIMEOUT,
    Place,
    Process,
    connect,
    find_place,
)
from megallama.train.pulse import Pulse
from megallama.train.signals import StopSignals
from megallama.train.supervisor import supervise

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

#: How long a failing process waits for the store to say whether another one reported the same.
ANSWER_SECONDS = 5.0

T = TypeVar("T")


def launch(
    nproc: int, prepare: Callable[[int], T], work: Callable[[T, Process, StopSignals], int]
) -> int:
    """Do `work` in as many processes as the launcher or `nproc` says; return the exit code.

    `prepare` is given the number of processes and makes what `work` is given first: here, before
    any worker starts, or in each process of a launcher, where all raise what one of them does.

    Signals set a flag from here on: before torch, which takes seconds to import. The exit code is
    right in every process of a launcher, but an error that several of them meet is printed by one
    alone: the others return its code. Who met a fault of its own always prints it.

    Raises:
        ConfigError: `nproc` is below 1 or was given under a launcher, whose variables may also be
            malformed.
        LostError: a process was killed, or the launcher's store does not answer.
        UserError: whatever `prepare` and `work` raise.
    """
    if nproc < 1:
        raise ConfigError(f"--nproc {nproc}: at least 1 process is needed")
    place = find_place(os.environ)
    if place and nproc > 1 and place.hosted and place.local_size == 1:
        on_node = partial(_work_on_node, place, nproc, prepare, work)
        return supervise(nproc, on_node, first=place.rank * nproc)
    if place and nproc > 1:
        if place.local_rank:
            return EXIT_CONFIG  # one line a machine
        raise ConfigError(
            f"--nproc {nproc}: a launcher already started {place.size} processes; leave --nproc "
            "out under torchrun, and under srun with more than one task a node"
        )
    if place is None:
        prepared = prepare(nproc)
        if nproc > 1:
            return supervise(nproc, partial(work, prepared))
    with StopSignals() as stop:
        if place is None:
            return work(prepared, ALONE, stop)
        return _work_under_launcher(connect(place), stop, prepare, work)


def _work_on_node(
    node: Place,
    nproc: int,
    prepare: Callable[[int], T],
    work: Callable[[T, Process, StopSignals], int],
    local: Process,
    stop: StopSignals,
) -> int:
    """`work` in a local worker of a job that has one task on each node."""
    place = replace(
        node,
        rank=node.rank * nproc + local.rank,
        size=node.size * nproc,
        local_rank=local.rank,
        local_size=nproc,
    )
    return _work_under_launcher(connect(place), stop, prepare, work)


def _work_under_launcher(
    process: Process,
    stop: StopSignals,
    prepare: Callable[[int], T],
    work: Callable[[T, Process, StopSignals], int],
) -> int:
    """`work`, with each distinct error printed once a job: 2048 equal lines would hide the rest."""
    meeting = Meeting(process, "launch")
    prepared: list[T] = []

    def prepare_here() -> str:
        prepared.append(prepare(process.size))
        return ""

    try:
        # A rank that never starts ends the others in minutes.
        with Pulse(process, STORE_TIMEOUT.total_seconds()) as pulse:
            Meeting(process, "launch", pulse).hold(prepare_here)
        code = work(prepared[0], process, stop)
    except UserError as error:
        speaks = _speaks(process, error)
        meeting.adjourn(LAST_WORDS)
        if not speaks:
            return error.exit_code
        if process.rank and not error.shared:
            error.args = (said_by(process.rank, str(error)),)
        raise
    meeting.adjourn()
    return code


def _speaks(process: Process, error: UserError) -> bool:
    """Whether this process prints `error`: the first that met it does.

    Ranks that each name the peer that they lost, and follow from each other, count as one: what all
    agreed on, and a fault that a rank met itself, is not hidden behind them. Where the store does
    not answer, one process a node speaks, and who met a fault of its own.
    """
    if process.store is None:
        return True
    own = not error.follows and not error.shared
    first = _is_first(process.store, "lost" if error.follows and not error.shared else str(error))
    return (own or process.local_rank == 0) if first is None else first


def _is_first(store: Store, message: str) -> bool | None:
    """Whether nobody asked this before of the same message; None if the store does not say."""
    answers: list[int] = []

    def ask() -> None:
        with suppress(RuntimeError):  # the host of the store is gone
            answers.append(store.add(f"megallama/error/{message}", 1))

    # The call has no time limit of its own, and a host that lost its power refuses nothing.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return answers[0] == 1 if answers else None
