"""A pass is a coroutine: it yields a handle where it needs a value, and the driver waits for it.

The pass never waits itself, so whoever drives it decides what runs meanwhile: nothing, a deferred
weight gradient, or another pass (`in_turns`). What runs when is a function of the passes alone; the
driver never asks whether a handle is complete, so every rank issues its collectives in the same
order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any, Final, TypeVar

from megallama.dist.handle import Done, Handle

T = TypeVar("T")

#: A coroutine that yields handles, is sent their values, and returns a T.
Pass = Generator[Handle[Any], Any, T]

#: Yielded where a pass waits for nothing and another may take its turn.
PAUSE: Final = Done(None, cover=1)


class WgradQueue:
    """Weight gradients that a backward pass has put off, run first in, first out.

    The order of a weight's additions is the order of the backward passes, whatever hides what, so
    overlap changes no bit. Without `overlap` nothing is put off.
    """

    def __init__(self, overlap: bool = True) -> None:
        self._overlap = overlap
        self._deferred: deque[Callable[[], None]] = deque()

    def defer(self, wgrad: Callable[[], None]) -> None:
        """Put `wgrad` off to a later wait."""
        self._deferred.append(wgrad)
        if not self._overlap:
            self.run(1)

    def __len__(self) -> int:
        return len(self._deferred)

    def run(self, count: int) -> None:
        """Run the oldest `count` weight gradients that were put off, or as many as there are."""
        for _ in range(min(count, len(self._deferred))):
            self._deferred.popleft()()


def drive(coroutine: Pass[T], queue: WgradQueue | None = None) -> T:
    """Run a pass to its end and return its value.

    Before each wait as many weight gradients of the queue run as the handle's `cover` says; what is
    left at the end runs then. An all-gather or reduce-scatter has a cover of one, because it takes
    about as long as one weight gradient, and the next wait would have none of its own
    (docs/design.md, "The layer").
    """
    queue = WgradQueue() if queue is None else queue
    value: Any = None
    while True:
        try:
            handle = coroutine.send(value)
        except StopIteration as end:
            queue.run(len(queue))
            result: T = end.value
            return result
        queue.run(handle.cover)
        value = handle.wait()


def in_turns(passes: Iterable[Pass[Any]]) -> Pass[None]:
    """Run passes that hide each other's collectives, in turns of one round.

    A turn ends where a pass yields a handle with a cover; it is waited for when the pass has its
    next turn.
    """
    waiting: deque[tuple[Pass[Any], Handle[Any]]] = deque((each, Done(None)) for each in passes)
    while waiting:
        each, handle = waiting.popleft()
        following = yield from _take_turn(each, handle)
        if following is not None:
            waiting.append((each, following))


def _take_turn(each: Pass[Any], handle: Handle[Any]) -> Pass[Handle[Any] | None]:
    """Run a pass up to its next handle with a cover, which is returned; None at its end."""
    while True:
        value = yield handle
        try:
            handle = each.send(value)
        except StopIteration:
            return None
        if handle.cover:
            return handle
