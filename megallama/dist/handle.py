"""A handle stands for a value that is on its way: a collective's result, a gathered weight.

A pass yields the handle where it needs the value; the driver waits and sends the value back in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Handle(Protocol[T_co]):
    """Something that is waited for once.

    `collective` says whether communication goes on until then, so that the wait is worth filling.
    It depends on what the handle stands for, never on how far it has come.
    """

    @property
    def collective(self) -> bool: ...

    def wait(self) -> T_co: ...


@dataclass(frozen=True)
class Done(Generic[T]):
    """A handle whose value is already here: a resident weight, a collective over a group of one."""

    value: T
    collective: bool = False

    def wait(self) -> T:
        return self.value
