"""A persistent pool of worker processes that run cases, each on as many of them as it has ranks.

A fork server, which has imported everything and run nothing, forks the workers; so a new one costs
milliseconds and inherits no thread. Cases that need few ranks run side by side. A case whose rank
fails, dies or takes too long is reported with that rank's traceback, and its workers are replaced:
the others may be waiting for it for ever.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch.distributed import PrefixStore, Store, TCPStore

ADDRESS = "127.0.0.1"
#: A case takes one to three seconds on two idle cores; beside another such pool, thirty times that.
SECONDS = 180.0


@dataclass(frozen=True)
class Seat:
    """A worker's place in a case: its rank, and the store where the case's ranks meet."""

    rank: int
    size: int
    store: Store


@dataclass(frozen=True)
class Task:
    """`work(seat, *arguments)` on `ranks` workers; a module's function, so that it pickles."""

    ranks: int
    work: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What each rank returned; or, where one failed, why, and then no results."""

    results: list[Any]
    error: str | None = None
    seconds: float = 0.0


@dataclass
class _Worker:
    process: Any
    pipe: Connection


@dataclass
class _Running:
    number: int
    workers: list[_Worker]
    started: float
    results: dict[int, Any] = field(default_factory=dict)


class Pool:
    """`size` workers; a context manager."""

    def __init__(self, size: int = 8, seconds: float = SECONDS) -> None:
        self.size, self.seconds = size, seconds
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.layouts.pool", "tests.layouts.body"])
        self._store = TCPStore(ADDRESS, 0, is_master=True, wait_for_workers=False)
        self._count = 0
        self._free: list[_Worker] = []
        self._running: list[_Running] = []

    def __enter__(self) -> Pool:
        self._free = self._fork(self.size)
        return self

    def __exit__(self, *_: object) -> None:
        for worker in [*self._free, *(w for case in self._running for w in case.workers)]:
            _end(worker)

    def run(self, task: Task) -> Outcome:
        """One task to its end."""
        return next(self.run_all([task]))[1]

    def run_all(self, tasks: Iterable[Task]) -> Iterator[tuple[int, Outcome]]:
        """The number and the outcome of each task, as they end; tasks are made as they are needed.

        A task may overtake a few that need more workers than are free.
        """
        coming, waiting = iter(enumerate(tasks)), deque[tuple[int, Task]]()
        while True:
            waiting.extend(islice(coming, self.size - len(waiting)))
            for number, task in list(waiting):
                if task.ranks > self.size:
                    raise ValueError(f"{task.ranks} ranks in a pool of {self.size}")
                if task.ranks <= len(self._free):
                    waiting.remove((number, task))
                    self._start(number, task)
            if not self._running:
                return
            yield from self._collect()

    def _start(self, number: int, task: Task) -> None:
        workers, self._free = self._free[: task.ranks], self._free[task.ranks :]
        self._count += 1
        for rank, worker in enumerate(workers):
            worker.pipe.send((self._count, rank, task))
        self._running.append(_Running(number, workers, time.monotonic()))

    def _collect(self) -> Iterator[tuple[int, Outcome]]:
        """Wait for news; yield the tasks that ended with it."""
        pipes = [w.pipe for case in self._running for w in case.workers]
        deadline = min(case.started for case in self._running) + self.seconds
        ready = set(wait(pipes, max(0.0, deadline - time.monotonic())))
        for case in list(self._running):
            error = self._news(case, ready)
            if error is None and len(case.results) < len(case.workers):
                continue
            self._running.remove(case)
            if error is None:
                self._free += case.workers
            else:
                for worker in case.workers:
                    _end(worker)
                self._free += self._fork(len(case.workers))
            results = [] if error else [case.results[r] for r in range(len(case.workers))]
            yield case.number, Outcome(results, error, time.monotonic() - case.started)

    def _news(self, case: _Running, ready: set[Any]) -> str | None:
        """Take what the ranks of a case sent; return the error that came first."""
        errors: list[tuple[float, str]] = []
        for rank, worker in enumerate(case.workers):
            if worker.pipe in ready:
                try:
                    when, error, result = worker.pipe.recv()
                except EOFError:
                    worker.process.join(1)
                    code = worker.process.exitcode
                    when, error = 0.0, f"the process died with exit code {code}"
                if error:
                    errors.append((when, f"rank {rank}: {error}"))
                else:
                    case.results[rank] = result
        if errors:
            return min(errors)[1]
        missing = [rank for rank in range(len(case.workers)) if rank not in case.results]
        if missing and time.monotonic() - case.started > self.seconds:
            return f"no end after {self.seconds:.0f} s; ranks {missing} are still at it"
        return None

    def _fork(self, count: int) -> list[_Worker]:
        workers = []
        for _ in range(count):
            ours, theirs = multiprocessing.Pipe()
            arguments = (theirs, self._store.port)
            process = self._context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            workers.append(_Worker(process, ours))
        for worker in workers:
            worker.pipe.recv()  # it is ready: no case pays for a start
        return workers


def _end(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.kill()
    worker.process.join()


def _serve(pipe: Connection, port: int) -> None:
    """A worker: tasks in, results or tracebacks out, until the pipe closes."""
    torch.set_num_threads(1)
    store = TCPStore(ADDRESS, port, is_master=False)
    with suppress(EOFError, OSError):
        pipe.send("ready")
        while True:
            pipe.send(_answer(store, *pipe.recv()))


def _answer(store: Store, number: int, rank: int, task: Task) -> tuple[float, str | None, Any]:
    """When it ended, the error and the result."""
    seat = Seat(rank, task.ranks, PrefixStore(f"case{number}", store))
    try:
        result = task.work(seat, *task.arguments)
    except BaseException:
        return time.monotonic(), traceback.format_exc(), None
    return time.monotonic(), None, result
