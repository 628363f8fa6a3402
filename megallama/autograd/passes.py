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
        """Put `wgrad` off to the next wait."""
        self._deferred.append(wgrad)

    def run(self) -> None:
        """Run everything that was put off."""
        while self._deferred:
            self._deferred.popleft()()


def drive(coroutine: Pass[T], queue: WgradQueue | None = None) -> T:
    """Run a pass to its end and return its value.

    At each handle the queue's weight gradients run first, under the collective that is in flight;
    whatever is left at the end runs then.
    """
    queue = queue or WgradQueue()
    value: Any = None
    while True:
        try:
            handle = coroutine.send(value)
        except StopIteration as end:
            queue.run()
            result: T = end.value
            return result
        queue.run()
        value = handle.wait()
