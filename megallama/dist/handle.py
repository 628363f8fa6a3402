"""A handle stands for a value that is on its way: a collective's result, a gathered weight.

A pass yields the handle where it needs the value; the driver waits and sends the value back in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Handle(Protocol[T_co]):
    """Something that is waited for once."""

    def wait(self) -> T_co: ...


@dataclass(frozen=True)
class Done(Generic[T]):
    """A handle whose value is already here: what a collective over a group of one returns."""

    value: T

    def wait(self) -> T:
        return self.value
