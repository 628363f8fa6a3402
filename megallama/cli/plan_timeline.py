"""A predicted step as a timeline: the form, the file and the picture of a measured one."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megallama.cli.plan_figures import Planned
from megallama.cli.plan_inside import draw_inside, first_passes
from megallama.cli.plan_text import layout_words
from megallama.dist.recorder import Event
from megallama.plan.spans import Span, spans
from megallama.train.trace import RankTimeline, Timeline, stage_of

#: Lanes of what is inside a pass, of the first pass of each kind alone: in a trace under the
#: passes, too fine for a picture.
INSIDE = ("kernels", "tensor")
#: Inches: of the picture, around the step, of the axes that look inside and the room above them.
WIDTH, TOP, BOTTOM, LEFT, RIGHT, ZOOM, GAP = 12.0, 1.1, 0.6, 0.9, 0.24, 0.8, 0.95


def timeline(plan: Planned) -> Timeline:
    """The predicted step, a rank for each pipeline stage, with what is inside of passes."""
    return _timeline(spans(plan.config, plan.hardware, plan.grid.size), "pp {}, predicted")


def beside_measured(plan: Planned, measured: Timeline) -> Timeline:
    """A measured step of the run, each rank that is shown over its stage's prediction.

    A rank that the plan has no stage for stands alone: the file may be of another grid.
    """
    from megallama.train.timeline import shown_beside

    found = spans(plan.config, plan.hardware, plan.grid.size)
    stages = _timeline([span for span in found if span.lane not in INSIDE], "{}").ranks
    predicted = [
        replace(stages[stage], name=rank.name)
        for rank in measured.ranks
        if (stage := stage_of(rank.name)) is not None and stage < len(stages)
    ]
    return shown_beside(measured, Timeline(measured.step, tuple(predicted)))


def _timeline(found: Sequence[Span], name: str) -> Timeline:
    events: dict[int, list[Event]] = defaultdict(list)
    for span in found:
        events[span.rank].append(_event(span))
    ranks = (RankTimeline(name.format(rank), "", tuple(events[rank])) for rank in sorted(events))
    return Timeline(1, tuple(ranks))


def _event(span: Span) -> Event:
    if span.lane == "compute":
        return Event("compute", span.kind, span.name, span.start, span.end)
    return Event("communication", span.lane, span.name, span.start, span.end)


def picture(plan: Planned) -> bytes:
    """The PNG: the step as a measured one is drawn, and two layers of its passes from inside."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from megallama.train.picture import STYLE
    from megallama.train.timeline import ROW_INCHES, draw_timeline, shown_ranks

    found = spans(plan.config, plan.hardware, plan.grid.size)
    drawn = _timeline([span for span in found if span.lane not in INSIDE], "pp {}")
    zooms = first_passes(plan, found)
    rows = ROW_INCHES * max(2, len(shown_ranks(drawn)))
    below = ZOOM + GAP if zooms else 0.0
    height = TOP + rows + below + BOTTOM
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), dpi=160, facecolor="white")
        width = WIDTH - LEFT - RIGHT
        axes = _axes(figure, LEFT, BOTTOM + below, width, rows)
        draw_timeline(axes, drawn)
        _write_head(plan, axes, drawn)
        half = (width - LEFT) / 2
        for place, (one, layers) in enumerate(zooms):
            zoom = _axes(figure, LEFT + place * (half + LEFT), BOTTOM, half, ZOOM)
            draw_inside(zoom, one, layers, found)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _axes(figure: Any, left: float, bottom: float, width: float, height: float) -> Any:
    """Axes, in inches."""
    high = figure.get_figheight()
    return figure.add_axes((left / WIDTH, bottom / high, width / WIDTH, height / high))


def _write_head(plan: Planned, axes: Any, drawn: Timeline) -> None:
    """Title, subtitle and legend."""
    from matplotlib.patches import Patch

    from megallama.train.picture import MUTED
    from megallama.train.timeline import legend_entries

    figure, step = axes.figure, plan.prediction
    height, left = figure.get_figheight(), 0.24 / WIDTH
    words = f"{plan.config.run.name} on {plan.grid.size:,} x {plan.hardware.name}: a predicted step"
    figure.text(left, 1 - 0.3 / height, words, fontsize=16, fontweight="bold", va="center")
    words = f"{layout_words(plan.config)}; {step.step_seconds:.2f} s, "
    words += f"{step.tokens_per_second_per_gpu:,.0f} tokens/s/GPU"
    figure.text(left, 1 - 0.62 / height, words, fontsize=10, color=MUTED, va="center")
    patches = [Patch(color=colour, label=word) for word, colour in legend_entries(drawn)]
    figure.legend(
        handles=patches, loc="center right", ncols=len(patches), frameon=False, fontsize=9.5,
        bbox_to_anchor=(1 - RIGHT / WIDTH + 0.01, 1 - 0.92 / height), handlelength=1.1,
        columnspacing=1.3,
    )  # fmt: skip
