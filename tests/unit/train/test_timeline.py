"""The drawn timeline: every box where its event was, in the colour of what it was."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from megallama.train.picture import _draw_measured, draw
from megallama.train.record import RunRecord, read_run
from megallama.train.report import render_page, write_report
from megallama.train.timeline import (
    BLUE,
    GREEN,
    GREY,
    GROUPS,
    IDLE,
    MOST_ROWS,
    ORANGE,
    OTHER_GROUP,
    draw_timeline,
    legend_entries,
    lighter,
    shown_beside,
    shown_ranks,
)
from megallama.train.trace import FOLDER, RankTimeline, Timeline, timeline_name, trace_of
from tests.unit.train.test_report import Page, make_run, step_row
from tests.unit.train.timelines import TICK, moved, ran, rank

Box = tuple[str, float, float, float, float]


def drawn(*ranks: RankTimeline) -> Axes:
    figure = Figure(figsize=(12, 2))
    axes = figure.add_axes((0.1, 0.1, 0.8, 0.8))
    draw_timeline(axes, Timeline(50, ranks))
    return axes


def boxes(axes: Axes) -> set[Box]:
    """(colour, begin and end in ticks, top, bottom) of every box but the empty lanes."""
    found = set()
    for collection in axes.collections:
        colour = to_hex(collection.get_facecolor()[0])
        for path in collection.get_paths():
            (left, top), (right, bottom) = path.vertices.min(0), path.vertices.max(0)
            ticks = [round(x / (1000 * TICK), 6) for x in (left, right)]
            if colour != IDLE:
                found.add((colour, *ticks, round(top, 6), round(bottom, 6)))
    return found


def colours_at(axes: Axes, tick: float) -> list[str]:
    """The passes' colours at a time, from above."""
    return [c for c, b, e, top, _ in sorted(boxes(axes), key=lambda b: b[3]) if b <= tick < e]


def test_a_pass_is_a_box_of_its_colour_from_begin_to_end() -> None:
    axes = drawn(
        rank("a", ran("F(0, 0)", 0, 10), ran("B(0, 0)", 10, 25), ran("W(0, 0)", 30, 40)),
        rank("b", ran("Reduce(chunk=0)", 5, 6, "reduce"), ran("Step()", 41, 50, "step")),
    )
    spans = {(colour, begin, end, int(top)) for colour, begin, end, top, _ in boxes(axes)}
    assert spans == {
        (BLUE, 0, 10, 0),
        (ORANGE, 10, 25, 0),
        (GREEN, 30, 40, 0),
        (GREY, 5, 6, 1),
        (GREY, 41, 50, 1),
    }
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert axes.get_xlim() == pytest.approx((0, 50 * 1000 * TICK))
    assert axes.get_ylim() == (2, 0)


def test_passes_that_do_two_things_have_both_colours() -> None:
    axes = drawn(
        rank(
            "a",
            ran("BW(0, 0)", 0, 10),
            ran("F(0, 3)+BW(0, 1)", 10, 20, "FB"),
            ran("F(0, 4)+B(0, 2)", 20, 30, "FB"),
        )
    )
    assert colours_at(axes, 5) == [ORANGE, GREEN]
    assert colours_at(axes, 15) == [BLUE, ORANGE, GREEN]
    assert colours_at(axes, 25) == [BLUE, ORANGE]
    for tick in (5, 15, 25):  # they fill the lane, without overlapping
        lanes = sorted((top, low) for _, b, e, top, low in boxes(axes) if b <= tick < e)
        assert all(low == top for (_, low), (top, _) in pairwise(lanes))
        assert (lanes[0][0], lanes[-1][1]) == pytest.approx((0.08, 0.64))


def test_a_rank_s_later_chunks_are_lighter() -> None:
    """Chunks 1 and 3 are the first and the second of this rank."""
    axes = drawn(rank("a", ran("F(1, 0)", 0, 10), ran("F(3, 0)", 10, 20)))
    assert colours_at(axes, 5) == [BLUE]
    assert colours_at(axes, 15) == [lighter(BLUE, 1)]
    assert lighter("#204060", 0) == "#204060"
    shades = [int(lighter("#204060", step)[1:], 16) for step in range(3)]
    assert shades == sorted(set(shades))


def test_the_micro_batch_stands_where_it_fits() -> None:
    """1000 ticks over 9.6 inches: a digit of 8.5 points needs about 12."""
    axes = drawn(
        rank("a", ran("F(0, 1)", 0, 5), ran("F(0, 2)", 5, 400), ran("F(0, 17)+B(0, 3)", 400, 1000))
    )
    assert [text.get_text() for text in axes.texts] == ["2", "17", "3"]
    centres = [text.get_position()[0] / (1000 * TICK) for text in axes.texts]
    assert centres == pytest.approx([202.5, 700, 700])


def test_groups_stand_below_the_passes_each_in_its_colour() -> None:
    """What overlaps in time does not in place: the pipeline's messages have a lane of their own."""
    axes = drawn(
        rank(
            "a",
            ran("F(0, 0)", 0, 100),
            moved("tensor", 10, 20),
            moved("pipeline 0>1", 5, 60),
            moved("data", 30, 40),
            moved("elsewhere", 50, 55),
        )
    )
    found = {(colour, b, e): (top, low) for colour, b, e, top, low in boxes(axes)}
    collectives = [(GROUPS["tensor"], 10, 20), (GROUPS["data"], 30, 40), (OTHER_GROUP, 50, 55)]
    message = found[GROUPS["pipeline"], 5, 60]
    assert len({found[key] for key in collectives}) == 1
    assert found[BLUE, 0, 100][1] < found[collectives[0]][0]
    assert found[collectives[0]][1] < message[0] < message[1] < 1


def test_the_legend_names_what_is_there() -> None:
    full = rank(
        "a",
        ran("BW(0, 0)", 0, 1),
        ran("Step()", 1, 2, "step"),
        moved("world", 1, 2),
        moved("pipeline 1>0", 1, 2),
        moved("elsewhere", 1, 2),
    )
    assert [word for word, _ in legend_entries(Timeline(1, (full,)))] == [
        *("B", "W", "reduce, step"),
        *("pipeline", "world", "other"),
    ]
    assert legend_entries(Timeline(1, (rank("a"),))) == []
    palette = [BLUE, ORANGE, GREEN, GREY, *GROUPS.values(), OTHER_GROUP]
    assert len(set(palette)) == len(palette)


@pytest.mark.parametrize("count", [1, MOST_ROWS, MOST_ROWS + 1, 1000])
def test_of_many_ranks_some_of_every_part_are_shown(count: int) -> None:
    ranks = tuple(rank(str(i)) for i in range(count))
    shown = [int(r.name) for r in shown_ranks(Timeline(1, ranks))]
    assert len(shown) == min(count, MOST_ROWS)
    assert shown == sorted(set(shown))
    gaps = np.diff([*shown, count])
    assert gaps.max() - gaps.min() <= 1


def test_of_many_ranks_beside_their_prediction_pairs_are_shown() -> None:
    ranks = tuple(rank(str(i), ran("F(0, 0)", 0, i + 1)) for i in range(100))
    both = shown_beside(Timeline(1, ranks), Timeline(1, ranks))
    assert shown_ranks(both) == both.ranks
    assert len(both.ranks) == MOST_ROWS
    for over, under in zip(both.ranks[::2], both.ranks[1::2], strict=True):
        assert (under.name, under.events) == ("predicted", over.events)
    axes = drawn(*shown_beside(Timeline(50, ranks[8:9]), Timeline(1, ranks[8:9])).ranks)
    assert {(b, e, int(top)) for _, b, e, top, _ in boxes(axes)} == {(0, 9, 0), (0, 9, 1)}


def test_an_empty_timeline_is_drawn() -> None:
    assert boxes(drawn(rank("a"))) == set()


# In the report


@pytest.fixture
def run(tmp_path: Path) -> RunRecord:
    nothing = dict.fromkeys(("lr", "grad_norm", "tokens_per_second"))
    rows = [step_row(step, **nothing) for step in range(1, 21)]
    run_dir = make_run(tmp_path / "demo", rows)
    timeline = Timeline(
        50, (rank("a", ran("F(0, 0)", 0, 256)), rank("b", ran("W(0, 0)", 256, 512)))
    )
    (run_dir / FOLDER).mkdir()
    (run_dir / FOLDER / timeline_name(50)).write_bytes(trace_of(timeline))
    return read_run(run_dir)


def test_the_report_has_the_recorded_step(run: RunRecord) -> None:
    page = Page(render_page(run, draw(run)))
    assert page.table["recorded step"] == (
        "step 50, 1,000 ms on 2 ranks; profiles/step-00000050.json opens in Perfetto"
    )


def test_a_prediction_in_the_picture_is_not_in_the_table(run: RunRecord, tmp_path: Path) -> None:
    assert run.timeline is not None
    slow = [replace(one, events=(ran("F(0, 0)", 0, 5120),)) for one in run.timeline.ranks[:1]]
    beside = shown_beside(run.timeline, Timeline(50, tuple(slow)))
    assert beside.seconds == 10
    path = write_report(tmp_path, run, beside=beside)
    page = Page(path.read_text())
    assert page.table["recorded step"].startswith("step 50, 1,000 ms on 2 ranks; ")
    assert path.with_name("loss.png").read_bytes() != draw(run)


@pytest.mark.parametrize(
    "recorded, beside, words",
    [
        (1, False, "1 rank"),
        (2, False, "2 ranks"),
        (40, False, "16 of 40 ranks"),
        (1, True, "1 rank, over the prediction"),
        (2, True, "2 ranks, over the prediction"),
        (40, True, "8 of 40 ranks, over the prediction"),
    ],
)
def test_the_title_counts_the_recorded_ranks(recorded: int, beside: bool, words: str) -> None:
    timeline = Timeline(50, tuple(rank(str(i), ran("F(0, 0)", 0, 9)) for i in range(recorded)))
    shown = shown_beside(timeline, timeline) if beside else timeline
    axes = Figure(figsize=(12, 2)).add_axes((0.1, 0.1, 0.8, 0.8))
    _draw_measured(axes, shown, recorded)
    assert axes.get_title() == f"step 50, measured on {words}"


def test_the_picture_has_a_row_a_rank(run: RunRecord) -> None:
    """F in the left half of a row, W in the right half of the next, and both nowhere else."""
    pixels = matplotlib.image.imread(io.BytesIO(draw(run)))[..., :3]
    height, width = pixels.shape[:2]

    def places(colour: str) -> tuple[np.ndarray, np.ndarray]:
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        near = np.abs(pixels - rgb).max(axis=2) < 0.02
        rows = near.sum(1) > width // 4  # a box, and no curve, text or legend
        return np.flatnonzero(rows), np.flatnonzero(near[rows].all(0))

    (f_rows, f_columns), (w_rows, w_columns) = places(BLUE), places(GREEN)
    assert f_rows.max() < w_rows.min()
    assert f_columns.max() < w_columns.min()
    assert abs(np.ptp(f_columns) - np.ptp(w_columns)) <= 4
    assert abs(len(f_rows) - len(w_rows)) <= 2
    assert 0.3 * height < f_rows.min() < w_rows.max() < 0.75 * height
