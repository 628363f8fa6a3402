"""A handle stands for a value that is on its way: a collective's result, a gathered weight.

A pass yields the handle where it needs the value; the driver waits and sends the value back in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Handle(Protocol[T_co]):
    """Something that is waited for.

    `cover` is how many deferred weight gradients are worth running before the wait: 0, the value is
    here; 1, an all-gather or a reduce-scatter; 2, an all-reduce, which moves twice the bytes. It
    depends on what the handle stands for, never on how far it has come, so that every rank runs
    the same things in the same order.
    """

    @property
    def cover(self) -> int: ...

    def wait(self) -> T_co: ...


@dataclass(frozen=True)
class Done(Generic[T]):
    """A handle whose value is already here: a resident weight, a collective over a group of one."""

    value: T
    cover: int = 0

    def wait(self) -> T:
        return self.value


@dataclass(frozen=True)
class Covered(Generic[T]):
    """A handle that needs no cover any more: enough has run since it was started."""

    handle: Handle[T]
    cover: int = 0

    def wait(self) -> T:
        return self.handle.wait()


@dataclass(frozen=True)
class Joined(Generic[T]):
    """Several handles as one: waits for each in order, then has `value`."""

    handles: Sequence[Handle[Any]]
    value: T

    @property
    def cover(self) -> int:
        """The largest of theirs: they travel at the same time."""
        return max((handle.cover for handle in self.handles), default=0)

    def wait(self) -> T:
        for handle in self.handles:
            handle.wait()
        return self.value
