"""A pass is a coroutine: it yields a handle where it needs a value, and the driver waits for it.

The pass never waits itself, so whoever drives it decides what runs meanwhile. Here that is the
queue of deferred weight gradients. What runs when is a function of the passes alone; the driver
never asks whether a handle is complete, so every rank issues its collectives in the same order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from typing import Any, TypeVar

from megallama.dist.handle import Handle

T = TypeVar("T")

#: A coroutine that yields handles, is sent their values, and returns a T.
Pass = Generator[Handle[Any], Any, T]


class WgradQueue:
    """Weight gradients that a backward pass has put off, run first in, first out.

    The order of a weight's additions is the order of the backward passes, whatever hides what, so
    overlap changes no bit.
    """

    def __init__(self) -> None:
        self._deferred: deque[Callable[[], None]] = deque()

    def defer(self, wgrad: Callable[[], None]) -> None:
        """Put `wgrad` off to a later wait."""
        self._deferred.append(wgrad)

    def __len__(self) -> int:
        return len(self._deferred)

    def run_one(self) -> None:
        """Run the oldest weight gradient that was put off, if there is one."""
        if self._deferred:
            self._deferred.popleft()()


def drive(coroutine: Pass[T], queue: WgradQueue | None = None) -> T:
    """Run a pass to its end and return its value.

    Before each wait for a collective one weight gradient of the queue runs, to hide it; whatever is
    left at the end runs then. One a wait, because a collective is about as long as one weight
    gradient, and the next wait has none of its own (docs/design.md, "The layer").
    """
    queue = WgradQueue() if queue is None else queue
    value: Any = None
    while True:
        try:
            handle = coroutine.send(value)
        except StopIteration as end:
            while queue:
                queue.run_one()
            result: T = end.value
            return result
        if handle.collective:
            queue.run_one()
        value = handle.wait()
