"""The timeline's file: what Perfetto reads, times on one clock, and back again."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megallama.dist.recorder import Event
from megallama.errors import ConfigError
from megallama.train.trace import (
    FOLDER,
    RankTimeline,
    Timeline,
    beside,
    dump_rank,
    load_rank,
    on_one_clock,
    read_timeline,
    timeline_name,
    trace_of,
)
from tests.unit.train.timelines import TICK, moved, ran, rank

TWO_RANKS = Timeline(
    50,
    (
        rank("pp 0 · tp 0", ran("F(0, 0)", 0, 8), moved("tensor", 2, 4), moved("data", 3, 9)),
        rank("pp 1 · tp 0", moved("tensor", 1, 2), moved("pipeline 0>1", 5, 6, "activations")),
    ),
)


def written(run_dir: Path, timeline: Timeline) -> Path:
    path = run_dir / FOLDER / timeline_name(timeline.step)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(trace_of(timeline))
    return path


def test_the_file_is_a_chrome_trace(tmp_path: Path) -> None:
    """The fields and units of the format's own description, by hand."""
    trace = json.loads(written(tmp_path, TWO_RANKS).read_bytes())
    entries = trace["traceEvents"]
    us = 1e6 * TICK
    boxes = [e for e in entries if e["ph"] == "X"]
    assert [(e["name"], e["cat"], e["pid"], e["tid"]) for e in boxes] == [
        ("F(0, 0)", "F", 0, 0),
        ("all_gather", "tensor", 0, 2),
        ("all_gather", "data", 0, 1),
        ("all_gather", "tensor", 1, 2),
        ("activations", "pipeline 0>1", 1, 1),
    ]
    times = [t for e in boxes for t in (e["ts"], e["dur"])]
    assert times == [t * us for t in (0, 8, 2, 2, 3, 6, 1, 1, 5, 1)]
    named = {
        (e["name"], e["pid"], e["tid"]): e["args"]["name"]
        for e in entries
        if e["ph"] == "M" and e["name"].endswith("_name")
    }
    assert named == {
        ("process_name", 0, 0): "pp 0 · tp 0",
        ("thread_name", 0, 0): "compute",
        ("thread_name", 0, 1): "data",
        ("thread_name", 0, 2): "tensor",
        ("process_name", 1, 0): "pp 1 · tp 0",
        ("thread_name", 1, 0): "compute",
        ("thread_name", 1, 1): "pipeline 0>1",
        ("thread_name", 1, 2): "tensor",
    }


def test_a_run_s_newest_timeline_is_read_back(tmp_path: Path) -> None:
    assert read_timeline(tmp_path) is None
    written(tmp_path, Timeline(9, (rank("alone", ran("F(0, 0)", 0, 1)),)))
    written(tmp_path, TWO_RANKS)
    found = read_timeline(tmp_path)
    assert found is not None
    assert (found.step, [r.name for r in found.ranks]) == (50, ["pp 0 · tp 0", "pp 1 · tp 0"])
    assert found.seconds == pytest.approx(9 * TICK, abs=1e-9)
    for one, other in zip(TWO_RANKS.ranks, found.ranks, strict=True):
        for mine, theirs in zip(one.events, other.events, strict=True):
            assert (mine.lane, mine.kind, mine.text) == (theirs.lane, theirs.kind, theirs.text)
            assert theirs.begin == pytest.approx(mine.begin, abs=1e-9)
            assert theirs.end == pytest.approx(mine.end, abs=1e-9)


def test_a_rank_s_events_travel_whole() -> None:
    for one in TWO_RANKS.ranks:
        assert load_rank(dump_rank(one)) == one


@given(st.lists(st.floats(0, 1e4), min_size=2, max_size=40))
def test_what_follows_each_other_never_overlaps_in_the_file(times: list[float]) -> None:
    """Perfetto drops an event that overlaps another of its thread."""
    marks = sorted(times)
    events = [Event("compute", "F", "F(0, 0)", *pair) for pair in pairwise(marks)]
    trace = json.loads(trace_of(Timeline(1, (RankTimeline("alone", "", tuple(events)),))))
    boxes = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    for before, after in pairwise(boxes):
        end_ns = round(1000 * before["ts"]) + round(1000 * before["dur"])
        assert end_ns <= round(1000 * after["ts"])


def test_groups_that_overlap_have_threads_of_their_own() -> None:
    trace = json.loads(trace_of(TWO_RANKS))
    kinds: dict[tuple[int, int], set[str]] = defaultdict(set)
    for entry in trace["traceEvents"]:
        if entry["ph"] == "X":
            kinds[entry["pid"], entry["tid"]].add(entry["cat"])
    assert all(len(found) == 1 for found in kinds.values())


# Clocks


def times(ranks: tuple[RankTimeline, ...]) -> list[list[tuple[float, float]]]:
    """In ticks."""
    return [[(e.begin / TICK, e.end / TICK) for e in r.events] for r in ranks]


def test_ranks_of_one_clock_keep_their_distances() -> None:
    """Though the sum over the world ended at 40 on one and at 47 on the other."""
    ranks = (
        rank("a", ran("F(0, 0)", 20, 30), moved("world", 32, 40), clock="x"),
        rank("b", ran("F(1, 0)", 25, 31), moved("world", 33, 47), clock="x"),
    )
    assert times(on_one_clock(ranks)) == [[(0, 10), (12, 20)], [(5, 11), (13, 27)]]


def test_machines_meet_where_the_last_sum_over_the_world_ended() -> None:
    """Two machines; the second's clock is 1000 ahead, and its first rank was woken 3 late."""
    near = (
        rank("a", moved("world", 1, 5), ran("F(0, 0)", 10, 20), moved("world", 22, 30), clock="x"),
    )
    far = [
        rank("b", ran("F(1, 0)", 12, 22), moved("world", 24, 33), clock="y"),
        rank("c", ran("F(1, 0)", 13, 23), moved("world", 24, 30), clock="y"),
    ]
    ahead = tuple(
        rank(
            r.name,
            *(
                Event(e.lane, e.kind, e.text, e.begin + 1000 * TICK, e.end + 1000 * TICK)
                for e in r.events
            ),
            clock=r.clock,
        )
        for r in far
    )
    assert times(on_one_clock((*near, *ahead))) == times(on_one_clock((*near, *far)))
    assert times(on_one_clock((*near, *ahead)))[1:] == [
        [(11, 21), (23, 32)],
        [(12, 22), (23, 29)],
    ]


def test_without_such_a_sum_machines_meet_at_their_first_event() -> None:
    ranks = (
        rank("a", ran("F(0, 0)", 10, 20), clock="x"),
        rank("b", ran("F(1, 0)", 512, 520), clock="y"),
        rank("c", clock="z"),
    )
    assert times(on_one_clock(ranks)) == [[(0, 10)], [(0, 8)], []]
    assert on_one_clock((rank("c", clock="z"),)) == (rank("c"),)


# Files that are none


BOX = {"name": "F(0, 0)", "cat": "F", "ph": "X", "ts": 0.0, "dur": 1.0, "pid": 0, "tid": 0}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"traceEvents": 7, "otherData": {"step": 1}}',
        '{"traceEvents": [7], "otherData": {"step": 1}}',
        '{"traceEvents": [], "otherData": {"step": "x"}}',
        *(
            json.dumps({"traceEvents": [BOX | change], "otherData": {"step": 1}})
            for change in ({"ts": -1.0}, {"dur": -1.0}, {"ts": float("nan")}, {"dur": "1"})
        ),
        "[" * 100_000,
    ],
    ids=lambda content: content[:24],
)
def test_a_file_that_is_no_timeline_is_named(tmp_path: Path, content: Any) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "step-00000001.json").write_text(content)
    with pytest.raises(ConfigError, match=r"step-00000001\.json is no timeline") as caught:
        read_timeline(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_in_a_timeline_s_place_is_named(tmp_path: Path) -> None:
    (tmp_path / FOLDER / "step-00000001.json").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"cannot read .*step-00000001\.json"):
        read_timeline(tmp_path)


# Predictions


def test_a_measured_rank_stands_over_its_prediction(tmp_path: Path) -> None:
    measured = Timeline(50, (rank("a", ran("F(0, 0)", 0, 8)), rank("b", ran("W(0, 0)", 1, 2))))
    predicted = Timeline(9, (rank("c", ran("F(0, 0)", 0, 1)), rank("a", ran("F(0, 0)", 0, 9))))
    both = beside(measured, predicted)
    assert [(r.name, r.events) for r in both.ranks] == [
        ("a", measured.ranks[0].events),
        ("predicted", predicted.ranks[1].events),
        ("b", measured.ranks[1].events),
    ]
    written(tmp_path, both)
    assert read_timeline(tmp_path) == both
