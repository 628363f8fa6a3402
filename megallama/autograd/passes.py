"""A pass is a coroutine: it yields a handle where it needs a value, and the driver waits for it.

The pass never waits itself, so whoever drives it decides what runs meanwhile: nothing, a deferred
weight gradient, or another pass (`in_turns`). What runs when is a function of the passes alone; the
driver never asks whether a handle is complete, so every rank issues its collectives in the same
order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any, Final, Generic, Protocol, TypeVar

from megallama.dist.handle import Done, Handle

T = TypeVar("T")
U = TypeVar("U")

#: A coroutine that yields handles, is sent their values, and returns a T.
Pass = Generator[Handle[Any], Any, T]

#: Yielded where a pass waits for nothing and another may take its turn.
PAUSE: Final = Done(None, cover=1)


class Filler(Protocol):
    """Work that is run in the waits of a pass."""

    def run(self, count: int) -> None:
        """Run `count` pieces of it, each about as long as one collective."""
        ...

    def end(self) -> None:
        """The pass has ended."""
        ...


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

    def end(self) -> None:
        """Run all that are left: they belong to the pass."""
        self.run(len(self))


class Beside(Generic[T]):
    """A pass that fills the waits of another, a turn at a time, and outlives it.

    A turn ends where the pass yields a handle with a cover, which is waited for when the next turn
    begins.
    """

    def __init__(self, coroutine: Pass[T]) -> None:
        self._coroutine = coroutine
        self._handle: Handle[Any] | None = Done(None)
        self._result: T

    def run(self, count: int) -> None:
        for _ in range(count):
            self._turn()

    def end(self) -> None:
        """The other pass has ended; this one goes on in an action of its own."""

    def finish(self) -> T:
        """Run what is left, and return the pass's value."""
        while self._handle is not None:
            self._turn()
        return self._result

    def _turn(self) -> None:
        while self._handle is not None:
            value = self._handle.wait()
            try:
                self._handle = self._coroutine.send(value)
            except StopIteration as end:
                self._handle, self._result = None, end.value
                return
            if self._handle.cover:
                return


def drive(coroutine: Pass[T], filler: Filler | None = None) -> T:
    """Run a pass to its end and return its value.

    Before each wait as many pieces of the filler run as the handle's `cover` says. An all-gather or
    reduce-scatter has a cover of one, because it takes about as long as one weight gradient, and
    the next wait would have none of its own (docs/design.md, "The layer").
    """
    filler = WgradQueue() if filler is None else filler
    value: Any = None
    while True:
        sent, value = value, None  # or it would live as long as the pass's next stretch
        try:
            handle = coroutine.send(sent)
        except StopIteration as end:
            filler.end()
            result: T = end.value
            return result
        filler.run(handle.cover)
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


def both(first: Pass[T], second: Pass[U]) -> Pass[tuple[T, U]]:
    """Run two passes in turns and return what both returned."""
    results: dict[int, Any] = {}

    def kept(place: int, each: Pass[Any]) -> Pass[None]:
        results[place] = yield from each

    yield from in_turns([kept(0, first), kept(1, second)])
    return results[0], results[1]


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
