"""A measured timeline as a file: Chrome's trace event format, which Perfetto and Chrome open.

Each recorded rank is a process of the trace. Its thread 0 holds the passes; each of its groups has
a thread of its own, since operations of different groups overlap, and what overlaps in a thread is
dropped by Perfetto. Times are in microseconds from the earliest event on.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megallama.dist.recorder import Event
from megallama.errors import ConfigError
from megallama.files import refuse_os_errors
from megallama.spec.grid import Place

COMPUTE_THREAD = 0
#: Of a run, where its timelines are. `RUN_DIR/profile` is what asks for one.
FOLDER = "profiles"
#: The name of a rank's prediction, under it.
PREDICTED = "predicted"


@dataclass(frozen=True)
class RankTimeline:
    """What one rank recorded, in seconds of the clock named `clock`.

    `name`: where it stands, such as `pp 0 · dp 1 · tp 0`.
    """

    name: str
    clock: str
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Timeline:
    """The recorded ranks from training step `step` on, in seconds from the earliest event on."""

    step: int
    ranks: tuple[RankTimeline, ...]

    @property
    def several(self) -> bool:
        """Whether it is of more than one step: in one, a rank runs each of its passes once."""
        for rank in self.ranks:
            passes = [event.text for event in rank.events if event.lane == "compute"]
            if len(set(passes)) < len(passes):
                return True
        return False

    @property
    def seconds(self) -> float:
        """From the begin of the earliest event to the end of the latest."""
        return max((event.end for rank in self.ranks for event in rank.events), default=0.0)


def place_words(place: Place) -> str:
    """Such as `pp 0 · dp 1 · tp 0`."""
    axes = (("pp", place.along("pipeline")), ("dp", place.along("data")))
    return " · ".join(f"{axis} {index}" for axis, index in (*axes, ("tp", place.along("tensor"))))


def stage_of(name: str) -> int | None:
    """The pipeline rank in what `place_words` gave; None where a file has another name."""
    found = re.match(r"pp (\d+)\b", name)
    return int(found[1]) if found else None


def beside(measured: Timeline, predicted: Timeline) -> Timeline:
    """Every measured rank over the predicted one of the same name, as one file.

    A rank that is not predicted stands alone; one that is not measured is left out.
    """
    found = {rank.name: rank for rank in predicted.ranks}
    rows: list[RankTimeline] = []
    for rank in measured.ranks:
        rows.append(rank)
        if rank.name in found:
            rows.append(replace(found[rank.name], name=PREDICTED))
    return Timeline(measured.step, tuple(rows))


def timeline_name(step: int) -> str:
    """The file's name, in RUN_DIR/profiles."""
    return f"step-{step:08d}.json"


def on_one_clock(ranks: Sequence[RankTimeline]) -> tuple[RankTimeline, ...]:
    """All times on one clock, from the earliest begin on.

    Ranks of one clock (of one machine) keep their distances. The clocks of two machines have
    nothing to do with each other, so a machine's events are shifted as one, until the sum over the
    world that ends the step ended on both at once; of a machine's ranks the first to have it
    counts. Where no such sum was recorded (NCCL), the first event counts.

    Ranks are not shifted one by one: eight on two busy cores saw the same sum end up to 9 ms apart,
    because they were woken late, and that would all be put into their times.
    """
    anchors: dict[str, float] = defaultdict(lambda: math.inf)
    for rank in ranks:
        if rank.events:
            anchors[rank.clock] = min(anchors[rank.clock], _anchor(rank.events))
    # To begin with, every clock's zero is its anchor; then the earliest event is.
    begins = [e.begin - anchors[rank.clock] for rank in ranks for e in rank.events]
    first = min(begins, default=0.0)

    def moved(event: Event, anchor: float) -> Event:
        return replace(event, begin=event.begin - anchor - first, end=event.end - anchor - first)

    return tuple(
        replace(rank, clock="", events=tuple(moved(e, anchors[rank.clock]) for e in rank.events))
        for rank in ranks
    )


def _anchor(events: Sequence[Event]) -> float:
    """The end of the last operation over the world, else the earliest begin."""
    ends = [event.end for event in events if event.kind == "world"]
    return max(ends, default=min(event.begin for event in events))


def dump_rank(rank: RankTimeline) -> str:
    """As text for `load_rank`."""
    events = [[e.lane, e.kind, e.text, e.begin, e.end] for e in rank.events]
    return json.dumps([rank.name, rank.clock, events])


def load_rank(text: str) -> RankTimeline:
    """What `dump_rank` was given."""
    name, clock, events = json.loads(text)
    return RankTimeline(name, clock, tuple(Event(*event) for event in events))


def trace_of(timeline: Timeline) -> bytes:
    """The file's content."""
    events = [entry for rank, own in enumerate(timeline.ranks) for entry in _entries(rank, own)]
    trace = {
        "displayTimeUnit": "ms",
        "otherData": {"step": timeline.step},
        "traceEvents": events,
    }
    # One event a line: a diff or a grep of the file says something.
    head, _, tail = json.dumps(trace | {"traceEvents": []}, indent=1).rpartition("[]")
    lines = ",\n".join(json.dumps(event, ensure_ascii=False) for event in events)
    return f"{head}[\n{lines}\n]{tail}\n".encode()


def _entries(pid: int, rank: RankTimeline) -> Iterator[dict[str, Any]]:
    """The names of a rank and of its threads, then its events."""
    groups = sorted({event.kind for event in rank.events if event.lane == "communication"})
    threads = {"compute": COMPUTE_THREAD}
    threads |= {name: COMPUTE_THREAD + place for place, name in enumerate(groups, 1)}
    yield _metadata("process_name", pid, COMPUTE_THREAD, {"name": rank.name})
    yield _metadata("process_sort_index", pid, COMPUTE_THREAD, {"sort_index": pid})
    for name, tid in threads.items():
        yield _metadata("thread_name", pid, tid, {"name": name})
        yield _metadata("thread_sort_index", pid, tid, {"sort_index": tid})
    for event in rank.events:
        # Whole nanoseconds, so that rounding makes no two events of a thread overlap.
        begin, end = round(event.begin * 1e9), round(event.end * 1e9)
        yield {
            "name": event.text,
            "cat": event.kind,
            "ph": "X",
            "ts": begin / 1000,
            "dur": (end - begin) / 1000,
            "pid": pid,
            "tid": COMPUTE_THREAD if event.lane == "compute" else threads[event.kind],
        }


def _metadata(name: str, pid: int, tid: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": pid, "tid": tid, "args": args}


def read_timeline(run_dir: Path) -> Timeline | None:
    """The newest timeline of a run, or None where it has none.

    Raises ConfigError where the file is not as `trace_of` makes it.
    """
    paths = sorted((run_dir / FOLDER).glob("step-*.json"))
    if not paths:
        return None
    path = paths[-1]
    with refuse_os_errors("read", path):
        content = path.read_bytes()
    try:
        return _parse(json.loads(content))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(
            f"{path} is no timeline of this program: move it away, then report again"
        ) from None


def _parse(trace: Any) -> Timeline:
    names: dict[int, str] = {}
    events: dict[int, list[Event]] = defaultdict(list)
    for entry in trace["traceEvents"]:
        pid = entry["pid"]
        if entry["name"] == "process_name":
            names[pid] = str(entry["args"]["name"])
        elif entry["ph"] == "X":
            begin, seconds = entry["ts"] / 1e6, entry["dur"] / 1e6
            if not 0 <= begin <= begin + seconds < math.inf:
                raise ValueError
            events[pid].append(
                Event(
                    "compute" if entry["tid"] == COMPUTE_THREAD else "communication",
                    kind=str(entry["cat"]),
                    text=str(entry["name"]),
                    begin=begin,
                    end=begin + seconds,
                )
            )
    ranks = (RankTimeline(names[pid], "", tuple(events[pid])) for pid in sorted(names))
    return Timeline(int(trace["otherData"]["step"]), tuple(ranks))
