"""What ran when: the passes of this process and the operations of its groups, for a timeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


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

    def take(self) -> list[Event]:
        """Hand over what was kept."""
        events, self._events = self._events, []
        return events
