"""Timelines by hand, for tests: in units of 1/512 s: whole nanoseconds, and exact in binary."""

from __future__ import annotations

from megallama.dist.recorder import Event
from megallama.train.trace import RankTimeline

TICK = 1 / 512


def ran(text: str, begin: int, end: int, kind: str = "") -> Event:
    """A pass, the reduction or the step."""
    return Event("compute", kind or text.partition("(")[0], text, begin * TICK, end * TICK)


def moved(group: str, begin: int, end: int, text: str = "all_gather") -> Event:
    """An operation of a group."""
    return Event("communication", group, text, begin * TICK, end * TICK)


def rank(name: str, *events: Event, clock: str = "") -> RankTimeline:
    return RankTimeline(name, clock, events)
