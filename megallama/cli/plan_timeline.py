"""A predicted step as a timeline: the form, the file and the picture of a measured one."""

from __future__ import annotations

import io
from collections import defaultdict
from typing import Any

from megallama.cli.plan_figures import Planned
from megallama.cli.plan_text import layout_words
from megallama.dist.recorder import Event
from megallama.plan.spans import Span, spans
from megallama.train.trace import RankTimeline, Timeline

#: Lanes of what is inside a pass, of the first pass of each kind alone: in a trace under the
#: passes, too fine for a picture.
INSIDE = ("kernels", "tensor")
WIDTH, TOP, BOTTOM, LEFT, RIGHT = 12.0, 1.1, 0.6, 0.9, 0.24  # inches


def timeline(plan: Planned, inside: bool = True) -> Timeline:
    """The predicted step, a rank for each pipeline stage; with what is `inside` of passes."""
    events: dict[int, list[Event]] = defaultdict(list)
    for span in spans(plan.config, plan.hardware, plan.grid.size):
        if inside or span.lane not in INSIDE:
            events[span.rank].append(_event(span))
    name = "pp {}, predicted" if inside else "pp {}"
    ranks = (RankTimeline(name.format(rank), "", tuple(events[rank])) for rank in sorted(events))
    return Timeline(1, tuple(ranks))


def _event(span: Span) -> Event:
    if span.lane == "compute":
        return Event("compute", span.kind, span.name, span.start, span.end)
    return Event("communication", span.lane, span.name, span.start, span.end)


def picture(plan: Planned) -> bytes:
    """The PNG, drawn as a measured step is."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from megallama.train.picture import MUTED, STYLE
    from megallama.train.timeline import ROW_INCHES, draw_timeline, shown_ranks

    drawn = timeline(plan, inside=False)
    rows = ROW_INCHES * max(2, len(shown_ranks(drawn)))
    height = TOP + rows + BOTTOM
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), dpi=160, facecolor="white")
        axes = figure.add_axes(
            (LEFT / WIDTH, BOTTOM / height, (WIDTH - LEFT - RIGHT) / WIDTH, rows / height)
        )
        draw_timeline(axes, drawn)
        left, title, subtitle = 0.24 / WIDTH, 1 - 0.3 / height, 1 - 0.62 / height
        step, name = plan.prediction, plan.config.run.name
        words = f"{name} on {plan.grid.size:,} x {plan.hardware.name}: a predicted step"
        figure.text(left, title, words, fontsize=16, fontweight="bold", va="center")
        words = f"{layout_words(plan.config)}; {step.step_seconds:.2f} s, "
        words += f"{step.tokens_per_second_per_gpu:,.0f} tokens/s/GPU"
        figure.text(left, subtitle, words, fontsize=10, color=MUTED, va="center")
        _draw_legend(axes, drawn, height)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_legend(axes: Any, drawn: Timeline, height: float) -> None:
    from matplotlib.patches import Patch

    from megallama.train.timeline import legend_entries

    patches = [Patch(color=colour, label=word) for word, colour in legend_entries(drawn)]
    axes.figure.legend(
        handles=patches, loc="center right", ncols=len(patches), frameon=False, fontsize=9.5,
        bbox_to_anchor=(1 - RIGHT / WIDTH + 0.01, 1 - 0.92 / height), handlelength=1.1,
        columnspacing=1.3,
    )  # fmt: skip
