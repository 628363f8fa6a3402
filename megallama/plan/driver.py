"""The order in which a rank issues what its passes are made of: `autograd.passes`, over data.

Every function here has its namesake there, and does to steps what that one does to handles.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol

from megallama.plan.ops import Compute, Defer, Issued, Pass, Wait


class Filler(Protocol):
    """Work that is run in the waits of a pass."""

    def run(self, count: int, issued: list[Issued]) -> None: ...

    def end(self, issued: list[Issued]) -> None: ...


class WgradQueue:
    """Weight gradients that a backward pass has put off, run first in, first out."""

    def __init__(self, overlap: bool = True) -> None:
        self._overlap = overlap
        self._deferred: deque[tuple[Compute, ...]] = deque()

    def defer(self, pieces: tuple[Compute, ...], issued: list[Issued]) -> None:
        self._deferred.append(pieces)
        if not self._overlap:
            self.run(1, issued)

    def run(self, count: int, issued: list[Issued]) -> None:
        for _ in range(min(count, len(self._deferred))):
            issued += self._deferred.popleft()

    def end(self, issued: list[Issued]) -> None:
        self.run(len(self._deferred), issued)


class Beside:
    """A pass that fills the waits of another, a turn at a time, and outlives it."""

    def __init__(self, steps: Pass[Any]) -> None:
        self._steps = steps
        self._wait: Wait | None = Wait()

    def run(self, count: int, issued: list[Issued]) -> None:
        for _ in range(count):
            self._turn(issued)

    def end(self, issued: list[Issued]) -> None:
        """The other pass has ended; this one goes on in an action of its own."""

    def finish(self) -> list[Issued]:
        """What is left."""
        issued: list[Issued] = []
        while self._wait is not None:
            self._turn(issued)
        return issued

    def _turn(self, issued: list[Issued]) -> None:
        if self._wait is None:
            return
        issued.append(self._wait)
        for step in self._steps:
            if isinstance(step, Wait) and step.cover:
                self._wait = step
                return
            assert not isinstance(step, Defer), "a W defers nothing"
            issued.append(step)
        self._wait = None


def drive(steps: Pass[Any], filler: Filler | None = None) -> list[Issued]:
    """Run a pass to its end: before each wait as many pieces of the filler as its cover says."""
    queue = WgradQueue() if filler is None else filler
    issued: list[Issued] = []
    for step in steps:
        if isinstance(step, Defer):
            assert isinstance(queue, WgradQueue), "weight gradients go to a queue"
            queue.defer(step.pieces, issued)
            continue
        if isinstance(step, Wait):
            queue.run(step.cover, issued)
        issued.append(step)
    queue.end(issued)
    return issued


def in_turns(passes: Iterable[Pass[Any]]) -> Pass[None]:
    """Passes that hide each other's collectives, in turns of one round.

    A turn ends where a pass waits with a cover; it is waited for when the pass has its next turn.
    """
    waiting: deque[tuple[Pass[Any], Wait]] = deque((steps, Wait()) for steps in passes)
    while waiting:
        steps, wait = waiting.popleft()
        yield wait
        for step in steps:
            if isinstance(step, Wait) and step.cover:
                waiting.append((steps, step))
                break
            yield step


def both(first: Pass[Any], second: Pass[Any]) -> Pass[None]:
    """Two passes in turns."""
    yield from in_turns([first, second])
