"""One thread that runs a group's operations in order: what a CUDA stream is to NCCL, on a CPU."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeAlias, TypeVar

import torch

from megallama.dist.watch import Vigil
from megallama.errors import LostError

T = TypeVar("T")

#: Seconds that an operation under way is given to end by itself when its group is closed, and that
#: a thread is given to end once the operation was broken off.
GRACE, END = 0.2, 5.0


class Pending(Generic[T]):
    """The handle of an operation that a worker runs; `wait` raises what the operation raised.

    Where that is a LostError, or where the wait is too long, the vigil says who is missing.
    """

    def __init__(self, cover: int, vigil: Vigil) -> None:
        self.cover = cover
        self._vigil = vigil
        self._ended = threading.Event()
        self._value: T
        self._error: BaseException | None = None

    def wait(self) -> T:
        self._vigil.outlast(self._ended)
        if isinstance(self._error, LostError):
            raise self._vigil.explain(self._error)
        if self._error is not None:
            raise self._error
        return self._value

    def succeed(self, value: T) -> None:
        self._value = value
        self._ended.set()

    def fail(self, error: BaseException) -> None:
        self._error = error
        self._ended.set()


class _Task(Generic[T]):
    """An operation to run and the handle that waits for it."""

    def __init__(self, operation: Callable[[], T], handle: Pending[T]) -> None:
        self._operation = operation
        self._handle = handle
        # Tensors made in inference mode may be written in inference mode only.
        self._inference = torch.is_inference_mode_enabled()

    def run(self, failure: BaseException | None) -> BaseException | None:
        """Run unless an earlier operation failed; returns the failure, of this one or earlier."""
        if failure is None:
            try:
                with torch.inference_mode(self._inference), torch.no_grad():
                    self._handle.succeed(self._operation())
                return None
            except BaseException as error:  # whoever waits gets it
                failure = error
        self._handle.fail(failure)
        return failure


_Queue: TypeAlias = "SimpleQueue[_Task[Any] | None]"


def _serve(queue: _Queue) -> None:
    """The thread: operations first in, first out, each to completion. After a failure none runs."""
    failure: BaseException | None = None
    while True:
        task = queue.get()
        if task is None:
            return
        failure = task.run(failure)
        del task  # its tensors: the next operation may be long in coming


def _stop(queue: _Queue, thread: threading.Thread, break_off: Callable[[], None]) -> None:
    """End the thread. An operation that does not end is broken off.

    A thread that still waited in gloo when the interpreter ends would abort the process: it comes
    back with an exception to an interpreter that is gone.
    """
    queue.put(None)
    if thread is threading.current_thread():
        return
    thread.join(GRACE)
    if thread.is_alive():
        break_off()
        thread.join(END)


class Worker:
    """Runs operations in the order of `submit`, in a thread of its own.

    `break_off` ends the connections and so makes an operation under way fail. It is called when an
    operation still runs as the worker is closed, collected, or the interpreter ends.
    """

    def __init__(self, name: str, vigil: Vigil, break_off: Callable[[], None]) -> None:
        self._queue: _Queue = SimpleQueue()
        self._vigil = vigil
        # The thread holds the queue and not the worker, so that a worker can be collected.
        thread = threading.Thread(target=_serve, args=(self._queue,), name=name, daemon=True)
        self._finalizer = weakref.finalize(self, _stop, self._queue, thread, break_off)
        thread.start()

    def submit(self, operation: Callable[[], T], cover: int) -> Pending[T]:
        """Queue an operation; RuntimeError after `close`."""
        if not self._finalizer.alive:
            raise RuntimeError("the group is closed")
        handle: Pending[T] = Pending(cover, self._vigil)
        self._queue.put(_Task(operation, handle))
        return handle

    def close(self) -> None:
        """End the thread; operations that were still queued fail."""
        self._finalizer()
