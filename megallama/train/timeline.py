"""Drawing a measured step: one row a rank, its passes over what its groups had under way."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from megallama.dist.recorder import Event
from megallama.train.trace import RankTimeline, Timeline, beside

INK = "#1f2933"
BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#d9691e", "#3a8f4d", "#a4aeb8"
#: Of each pass; one that does two things at once has both colours, one over the other.
PASSES = {"F": (BLUE,), "B": (ORANGE,), "W": (GREEN,), "BW": (ORANGE, GREEN)}
#: (top, height) of a pass's colours in its box.
BANDS: dict[str, tuple[tuple[float, float], ...]] = dict.fromkeys("FBW", ((0, 1),))
BANDS["BW"] = ((0, 0.68), (0.68, 0.32))
LEGEND = {BLUE: "F", ORANGE: "B", GREEN: "W", GREY: "reduce, step"}
#: Of each group, by the first word of its name.
GROUPS = {
    "tensor": "#8f7fc4",
    "pipeline": "#4ba3ad",
    "data": "#cfa93a",
    "world": "#c0647c",
    "key_value": "#c3b9e4",
    "tied": "#8a6f5a",
}
OTHER_GROUP, IDLE = "#c3cbd3", "#f1f3f5"
MOST_ROWS = 16  # more are no longer told apart at the picture's size
ROW_INCHES = 0.44
#: (top, height) in a row of height 1: of the passes, the collectives, the pipeline's messages.
PASS_LANE, COLLECTIVE_LANE, MESSAGE_LANE = (0.08, 0.56), (0.68, 0.11), (0.81, 0.11)
FONT = 8.5

#: (begin, seconds) of boxes, by (lane of the row, colour).
Boxes = dict[tuple[tuple[float, float], str], list[tuple[float, float]]]


def shown_ranks(timeline: Timeline) -> Sequence[RankTimeline]:
    """The ranks that get a row: all, or some from every part of a large grid."""
    return _some(timeline.ranks, MOST_ROWS)


def shown_beside(measured: Timeline, predicted: Timeline) -> Timeline:
    """What `draw_timeline` is to be given for a measured step beside its prediction.

    Each shown rank has a row, and its prediction the next. Both are drawn to one scale, from the
    step's begin.
    """
    ranks = tuple(_some(measured.ranks, MOST_ROWS // 2))
    return beside(replace(measured, ranks=ranks), predicted)


def _some(ranks: Sequence[RankTimeline], count: int) -> Sequence[RankTimeline]:
    if len(ranks) <= count:
        return ranks
    return [ranks[i * len(ranks) // count] for i in range(count)]


def draw_timeline(axes: Any, timeline: Timeline) -> None:
    """Draw the shown ranks, in milliseconds.

    A pass has its micro-batch's number where that fits; of a rank's chunks the first is the
    darkest. Under the passes stand the groups' operations, from start to end, waiting included.
    """
    ranks = shown_ranks(timeline)
    span = 1e3 * timeline.seconds or 1.0
    axes.set_xlim(0, span)
    axes.set_ylim(len(ranks), 0)
    points = 72 * axes.get_position().width * axes.figure.get_figwidth() / span
    for row, rank in enumerate(ranks):
        axes.broken_barh([(0, span)], (row + PASS_LANE[0], PASS_LANE[1]), facecolor=IDLE)
        _draw_passes(axes, row, rank.events, points)
        _draw_operations(axes, row, rank.events)
    axes.set_yticks([row + 0.5 for row in range(len(ranks))], [rank.name for rank in ranks])
    axes.tick_params(axis="y", labelsize=9)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("ms")


def _draw_passes(axes: Any, row: int, events: Iterable[Event], points: float) -> None:
    """`points`: of a millisecond's width on paper."""
    events = [event for event in events if event.lane == "compute"]
    passes = {event: _passes(event.text) for event in events}
    chunks = sorted({chunk for made in passes.values() for _, chunk, _ in made})
    boxes: Boxes = defaultdict(list)
    for event in events:
        begin, width = 1e3 * event.begin, 1e3 * (event.end - event.begin)
        top, height = PASS_LANE
        made = passes[event]
        if not made:
            boxes[PASS_LANE, GREY].append((begin, width))
        height /= max(1, len(made))
        for kind, chunk, micro_batch in made:
            step = chunks.index(chunk)
            for (first, share), colour in zip(BANDS[kind], PASSES[kind], strict=True):
                lane = (top + first * height, share * height)
                boxes[lane, lighter(colour, step)].append((begin, width))
            number, font = str(micro_batch), FONT if len(made) == 1 else 0.8 * FONT
            if points * width > 0.7 * font * len(number) + 2:
                share = BANDS[kind][0][1] if len(made) == 1 else 1
                axes.text(
                    begin + width / 2, row + top + share * height / 2, number, fontsize=font,
                    color=INK if step else "white", ha="center", va="center_baseline",
                )  # fmt: skip
            top += height
    _draw_boxes(axes, row, boxes, edge=0.5)


def _draw_operations(axes: Any, row: int, events: Iterable[Event]) -> None:
    boxes: Boxes = defaultdict(list)
    for event in events:
        if event.lane == "communication":
            group = _group(event.kind)
            lane = MESSAGE_LANE if group == "pipeline" else COLLECTIVE_LANE
            box = (1e3 * event.begin, 1e3 * (event.end - event.begin))
            boxes[lane, GROUPS.get(group, OTHER_GROUP)].append(box)
    _draw_boxes(axes, row, boxes, edge=0)


def _draw_boxes(axes: Any, row: int, boxes: Boxes, edge: float) -> None:
    for ((top, height), colour), spans in boxes.items():
        lane = (row + top, height)
        axes.broken_barh(spans, lane, facecolor=colour, edgecolor="white", lw=edge, zorder=2)


def _passes(text: str) -> list[tuple[str, int, int]]:
    """(kind, chunk, micro-batch) of every pass that a text such as `F(0, 3)+BW(0, 1)` names."""
    found = re.findall(r"\b(F|BW|B|W)\((\d+), (\d+)\)", text)
    return [(kind, int(chunk), int(micro_batch)) for kind, chunk, micro_batch in found]


def lighter(colour: str, step: int) -> str:
    """The colour of a rank's next chunk but `step`: mixed with white, at most three quarters."""
    share = min(0.45 * step, 0.75)
    mixed = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(value + (255 - value) * share):02x}" for value in mixed)


def legend_entries(timeline: Timeline) -> list[tuple[str, str]]:
    """(word, colour) of what the shown rows hold: the passes first, then the groups."""
    events = [event for rank in shown_ranks(timeline) for event in rank.events]
    made = {
        colour
        for event in events
        if event.lane == "compute"
        for colour in [c for kind, _, _ in _passes(event.text) for c in PASSES[kind]] or [GREY]
    }
    groups = {_group(event.kind) for event in events if event.lane == "communication"}
    entries = [(word, colour) for colour, word in LEGEND.items() if colour in made]
    entries += [(name, colour) for name, colour in GROUPS.items() if name in groups]
    return entries + [("other", OTHER_GROUP)] * bool(groups - GROUPS.keys())


def _group(kind: str) -> str:
    """`pipeline` of `pipeline 0>1`."""
    return kind.partition(" ")[0]
