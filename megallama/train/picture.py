"""A run's picture: its loss over learning rate, gradient norm and throughput, as one PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from megallama.train.record import RunRecord, column, median, shape_words, summarise
from megallama.train.timeline import ROW_INCHES, draw_timeline, legend_entries, shown_ranks
from megallama.train.trace import PREDICTED, Timeline

SMOOTH_ABOVE = 100  # points: a smoothed line over the raw one from here on
INK, MUTED, GRID = "#1f2933", "#6b7785", "#e6eaee"
BLUE, PALE_BLUE, ORANGE = "#1f5fa8", "#b5cfec", "#d9691e"
WIDTH, LEFT, RIGHT = 12.0, 0.72, 0.24  # inches
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so a report looks alike everywhere
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": "#c3cbd3",
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.parse_math": False,  # a name may hold a dollar sign
}


def draw(run: RunRecord, other: RunRecord | None = None, beside: Timeline | None = None) -> bytes:
    """The PNG: loss over learning rate, gradient norm and throughput, all against the step.

    The loss of an `other` run is drawn under it. A step that was recorded stands between the loss
    and the rest, as a timeline. `beside`: that step with its prediction, to be drawn in its place.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    timeline = beside or run.timeline
    rows = len(shown_ranks(timeline)) if timeline else 0
    loss, middle, panels = (2.75, 0.95 + ROW_INCHES * rows, 1.35) if rows else (2.97, 0.0, 1.7)
    height = 1.25 + loss + middle + 1.03 + panels + 0.65
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), dpi=160, facecolor="white")
        _write(figure, 0.33, run.name, fontsize=18, fontweight="bold")
        _write(figure, 0.65, subtitle(run), fontsize=11, color=MUTED)
        _draw_loss(_axes(figure, 1.25, loss), run, other)
        top = 1.25 + loss + 0.95
        if timeline and run.timeline:
            axes = _axes(figure, top, ROW_INCHES * rows, left=1.45)
            _draw_measured(axes, timeline, len(run.timeline.ranks))
        top = height - 0.65 - panels
        _draw_lr(_axes(figure, top, panels, 0), run)
        _draw_grad_norm(_axes(figure, top, panels, 1), run)
        _draw_throughput(_axes(figure, top, panels, 2), run)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _axes(
    figure: Any, top: float, height: float, third: int | None = None, left: float = LEFT
) -> Any:
    """Axes `top` inches under the figure's upper edge, over its width or over a third of it."""
    whole, gap = WIDTH - left - RIGHT, 0.76
    width = whole if third is None else (whole - 2 * gap) / 3
    left += (third or 0) * (width + gap)
    high = figure.get_figheight()
    return figure.add_axes((left / WIDTH, 1 - (top + height) / high, width / WIDTH, height / high))


def _write(figure: Any, top: float, text: str, **style: Any) -> None:
    """A line of text whose middle is `top` inches under the figure's upper edge."""
    figure.text(LEFT / WIDTH, 1 - top / figure.get_figheight(), text, va="center", **style)


def _draw_measured(axes: Any, timeline: Timeline, measured: int) -> None:
    """`measured`: how many ranks were recorded."""
    from matplotlib.patches import Patch

    draw_timeline(axes, timeline)
    rows = [rank.name for rank in shown_ranks(timeline)]
    predicted = PREDICTED in rows
    shown = len(rows) - rows.count(PREDICTED)
    ranks = f"{shown} of {measured} ranks" if shown < measured else f"{measured} rank"
    ranks += "s" * (1 < measured == shown) + ", over the prediction" * predicted
    title = f"step {timeline.step}, measured on {ranks}"
    axes.set_title(title, x=-0.0705, ha="left", fontsize=11.5, fontweight="bold", color=INK, pad=9)
    patches = [Patch(color=colour, label=word) for word, colour in legend_entries(timeline)]
    axes.legend(
        handles=patches, loc="lower right", bbox_to_anchor=(1.008, 0.985), ncols=len(patches),
        frameon=False, fontsize=9.5, handlelength=1.1, handleheight=0.9, columnspacing=1.3,
    )  # fmt: skip


def _draw_loss(axes: Any, run: RunRecord, other: RunRecord | None) -> None:
    figures = summarise(run)
    steps, losses = column(run.steps, "loss")
    if other:
        _draw_under(axes, other, run)
    _curve(axes, steps, losses, _with_value("training", figures["final_loss"]))
    shown = [losses]
    if run.validations:
        at, values = column(run.validations, "validation_loss")
        size, edge = (6.5, 0.9) if len(at) <= 40 else (3.2, 0)
        label = _with_value("validation", figures["validation_loss"])
        axes.plot(at, values, "o", color=ORANGE, ms=size, mec="white", mew=edge, label=label)
        shown.append(values)
    if run.entropy is not None:
        axes.axhline(run.entropy, color=MUTED, lw=1.2, ls=(0, (5, 4)))
        axes.annotate(
            f"unigram entropy of the corpus  {run.entropy:.3f}", (1, run.entropy), (-4, 5),
            xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", color=MUTED,
        )  # fmt: skip
        shown.append(np.array([run.entropy]))
    _limit(axes, shown)
    _label(axes, "loss, nats per token")
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.008, 0.985), ncols=3, frameon=False, fontsize=10.5
    )


def _draw_under(axes: Any, other: RunRecord, run: RunRecord) -> None:
    """Another run's loss as a wide line, smoothed as this run's is, that this run's lies on."""
    last = run.steps[-1]["step"]
    steps, losses = column([row for row in other.steps if row["step"] <= last], "loss")
    if len(run.steps) > SMOOTH_ABOVE:
        at, losses = smooth(losses, half_window(len(run.steps)))
        steps = steps[at]
    axes.plot(steps, losses, color=ORANGE, lw=7, alpha=0.35, label=other.name)


def _draw_lr(axes: Any, run: RunRecord) -> None:
    steps, rates = column(run.steps, "lr")
    _curve(axes, steps, rates, smoothed=False)
    if np.isfinite(rates).any():
        axes.set_ylim(0, (np.nanmax(rates) or 1.0) * 1.12)
    axes.yaxis.set_major_formatter(lambda value, _: _scientific(value))
    _label(axes, "learning rate", f"peak {_scientific(np.nanmax(rates, initial=0))}")


def _draw_grad_norm(axes: Any, run: RunRecord) -> None:
    steps, norms = column(run.steps, "grad_norm")
    _curve(axes, steps, norms)
    known = norms[np.isfinite(norms) & (norms > 0)]
    if known.size and known.max() > 30 * np.median(known):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        _limit(axes, [norms], floor=0)
    _label(axes, "gradient norm", f"median {np.median(known):.3g}" if known.size else "")


def _draw_throughput(axes: Any, run: RunRecord) -> None:
    rows = run.steps[1:] if len(run.steps) > SMOOTH_ABOVE else run.steps  # the first warms up
    steps, speeds = column(rows, "tokens_per_second")
    _curve(axes, steps, speeds)
    _limit(axes, [speeds], floor=0)
    axes.yaxis.set_major_formatter(lambda value, _: _short(value))
    speed, mfu = median(run.steps, "tokens_per_second"), median(run.steps, "mfu")
    words = [f"median {_short(speed)}"] if speed is not None else []
    _label(axes, "tokens/s", " · ".join(words + ([f"MFU {mfu:.1%}"] if mfu is not None else [])))


def _curve(
    axes: Any, steps: np.ndarray, values: np.ndarray, label: str = "", smoothed: bool = True
) -> None:
    """Draw the line; where points are many, pale under a smoothed one."""
    marker = "o" if len(steps) <= 20 else ""
    first, last = steps[0], steps[-1]
    if smoothed and len(steps) > SMOOTH_ABOVE:
        shown = thin(values)
        axes.plot(steps[shown], values[shown], color=PALE_BLUE, lw=0.9)
        at, values = smooth(values, half_window(len(values)))
        steps = steps[at]
    axes.plot(steps, values, color=BLUE, lw=2, marker=marker, ms=4.5, label=label)
    if first == last:
        first, last = 0, 2 * last
    axes.set_xlim(0 if first < 0.05 * last else first, last * 1.005)
    axes.xaxis.set_major_locator(_whole_steps())
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    axes.set_xlabel("step")


def half_window(count: int) -> int:
    """Half the window that smooths a series of `count` points: 2% of them."""
    return max(2, count // 50)


def smooth(values: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray]:
    """(indices, medians): a moving median over `half` points to either side, at about 600 points.

    A median, since one spike would draw a mean into a box. The window is narrow at the start, where
    a loss falls steeply, and one-sided at the end. Gaps (NaN) are left out.
    """
    count = len(values)
    spread = np.concatenate([np.geomspace(1, count, 200) - 1, np.linspace(0, count - 1, 400)])
    at = np.unique(spread.round().astype(int))
    windows = (values[max(0, i - min(half, i)) : i + min(half, i) + 1] for i in at)
    known = (window[np.isfinite(window)] for window in windows)
    return at, np.array([np.median(window) if window.size else math.nan for window in known])


def thin(values: np.ndarray, bins: int = 4000) -> np.ndarray:
    """Indices of the least and the greatest value of each of `bins` runs of points.

    The picture is no wider than that, so a line through them looks like the line through all, with
    every spike in place, and a run of a million steps draws as fast as one of thousands.
    """
    if len(values) <= 2 * bins:
        return np.arange(len(values))
    kept = []
    for chunk in np.array_split(np.arange(len(values)), bins):
        known = chunk[np.isfinite(values[chunk])]
        kept += (
            [known[values[known].argmin()], known[values[known].argmax()]]
            if known.size
            else [chunk[0]]  # a gap stays a gap
        )
    return np.unique(kept)


def _whole_steps() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=6, integer=True)


def _limit(axes: Any, shown: Sequence[np.ndarray], floor: float | None = None) -> None:
    """Limits that hold all of `shown`, but the highest 0.5% of a long series: a loss's first steps
    and a spike would flatten the rest."""
    series = [values[np.isfinite(values)] for values in shown]
    series = [values for values in series if values.size]
    if not series:
        return
    high = max(
        np.percentile(values, 99.5) if values.size > SMOOTH_ABOVE else values.max()
        for values in series
    )
    low = min(values.min() for values in series) if floor is None else floor
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - (margin if floor is None else 0), high + margin)


def _label(axes: Any, title: str, figure: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=9)
    axes.set_title(figure, loc="right", fontsize=10.5, color=MUTED, pad=9)


def _with_value(word: str, loss: float | None) -> str:
    return word if loss is None else f"{word}  {loss:.3f}"


def subtitle(run: RunRecord) -> str:
    figures = summarise(run)
    parameters, tokens = figures["parameters"], figures["tokens"]
    parts = [shape_words(run.model)]
    if parameters:
        parts.append(f"{_short(parameters)} parameters")
    if tokens:
        parts.append(f"{_short(tokens)} tokens")
    return " · ".join(part for part in parts if part)


def _short(value: float) -> str:
    """Three figures and k, M, B or T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _scientific(value: float) -> str:
    """3e-4 rather than 3.0e-04."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}" if value else "0"
