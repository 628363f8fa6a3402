"""What ran when: the passes of this process and the operations of its groups, for a timeline."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Event:
    """A stretch of time, in seconds of `time.monotonic`, which all processes of a machine share.

    `kind`: a pass's F, B, W, BW or FB, or `reduce` or `step`; of an operation, its group's name.
    """

    lane: Literal["compute", "communication"]
    kind: str
    text: str
    begin: float
    end: float


class Recorder:
    """Keeps events while it is `on`. Any thread may add one."""

    def __init__(self) -> None:
        self.on = False
        self._events: list[Event] = []

    def add(self, event: Event) -> None:
        if self.on:
            self._events.append(event)

    def communication(self, group: str, text: str, operation: Callable[[], T]) -> T:
        """Run an operation of `group`; while `on`, keep when it ran. One that fails is not kept."""
        if not self.on:
            return operation()
        begin = time.monotonic()
        value = operation()
        self.add(Event("communication", group, text, begin, time.monotonic()))
        return value

    def take(self) -> list[Event]:
        """Hand over what was kept."""
        events, self._events = self._events, []
        return events
