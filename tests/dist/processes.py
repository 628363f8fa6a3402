"""Run a function in several processes that meet in a store: `run_on(4, body)`.

The store is a file. A TCPStore looks up the name of every address that connects, and where the name
server is slow each look-up may take 5 seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch
from torch.distributed import FileStore, Store

T = TypeVar("T")
Body = Callable[[int, Store], T]

LOCAL = "127.0.0.1"


def run_on(
    size: int, body: Body[T], time_limit: float = 120.0, dies: Collection[int] = ()
) -> list[T]:
    """`body(rank, store)` in `size` forked processes: their results in rank order.

    Raises what the first rank to fail raised, with that rank's traceback as its cause; RuntimeError
    for a process that ended without a word, unless its rank is in `dies` (its result is None);
    TimeoutError after `time_limit` seconds. No process outlives the call.
    """
    fork = multiprocessing.get_context("fork")
    workers: list[Any] = []
    ends: dict[Connection, int] = {}
    folder = tempfile.TemporaryDirectory()
    try:
        for rank in range(size):
            here, there = fork.Pipe(duplex=False)
            arguments = (rank, body, there, f"{folder.name}/store")
            workers.append(fork.Process(target=_work, args=arguments))
            workers[-1].start()
            there.close()
            ends[here] = rank
        return _collect(size, ends, time.monotonic() + time_limit, dies)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
        folder.cleanup()


def _work(rank: int, body: Body[T], end: Connection, path: str) -> None:
    """One process: run the body, send (result, error, traceback), and end at once."""
    torch.set_num_threads(1)
    result, error, trace = None, None, ""
    try:
        store = FileStore(path)
        store.set_timeout(timedelta(seconds=60))
        result = body(rank, store)
    except BaseException as caught:
        error, trace = caught, traceback.format_exc()
    # Plain pickle: a Connection would pass tensors as shared memory that this process owns.
    try:
        end.send_bytes(pickle.dumps((result, error, trace)))
    except Exception:
        end.send_bytes(pickle.dumps((None, RuntimeError(f"{error!r} of rank {rank}"), trace)))
    end.close()
    os._exit(0)


def _collect(
    size: int, ends: dict[Connection, int], deadline: float, dies: Collection[int]
) -> list[Any]:
    results: list[Any] = [None] * size
    while ends:
        ready = wait(list(ends), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(ends.values())} did not end in time")
        for end in ready:
            assert isinstance(end, Connection)
            rank = ends.pop(end)
            try:
                results[rank], error, trace = pickle.loads(end.recv_bytes())
            except EOFError:
                if rank not in dies:
                    raise RuntimeError(f"rank {rank} ended without a word") from None
                continue
            if error is not None:
                raise error from RuntimeError(f"in rank {rank}:\n{trace}")
    return results
