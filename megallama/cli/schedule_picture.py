"""A simulated schedule as a picture: a row a rank, in the colours of a measured step's timeline."""

from __future__ import annotations

import io
from collections import defaultdict
from typing import Any

from megallama.cli.schedule_json import Times, spans
from megallama.spec.schedules.simulate import Simulation

WIDTH = 12.0  # inches, as a report's picture
ROW_INCHES, MOST_INCHES = 0.42, 16.0
TOP, BOTTOM, LEFT, RIGHT = 0.95, 0.62, 0.85, 0.24  # inches around the timeline
HEIGHT, GAP = 0.8, 0.1  # of a rank's boxes in its row, and above them
FONT = 9.0


def draw(simulation: Simulation, times: Times) -> bytes:
    """The PNG. A second chunk is lighter; a pass that does two things has both colours."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    from megallama.train.picture import MUTED, STYLE

    schedule = simulation.schedule
    inches = min(ROW_INCHES * schedule.stages, MOST_INCHES)
    height = TOP + inches + BOTTOM
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), dpi=160, facecolor="white")
        axes = figure.add_axes(
            (LEFT / WIDTH, BOTTOM / height, (WIDTH - LEFT - RIGHT) / WIDTH, inches / height)
        )
        left, title, subtitle = LEFT / WIDTH, 1 - 0.3 / height, 1 - 0.62 / height
        figure.text(left, title, schedule.name, fontsize=18, fontweight="bold", va="center")
        figure.text(left, subtitle, _words(simulation), fontsize=11, color=MUTED, va="center")
        _draw_rows(axes, simulation, times, inches / schedule.stages)
        _draw_legend(axes, height)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _words(simulation: Simulation) -> str:
    schedule = simulation.schedule
    chunks = schedule.chunks // schedule.stages
    parts = [f"{schedule.stages} stages" + (f" × {chunks} chunks" if chunks > 1 else "")]
    parts.append(f"{schedule.micro_batches} micro-batches")
    parts.append(f"bubble {simulation.bubble_fraction:.1%}")
    parts.append(f"makespan {simulation.makespan:g}")
    memory = max(simulation.activation_memory)
    parts.append(f"activations of {memory:g} micro-batch{'es' if memory != 1 else ''}")
    return " · ".join(parts)


def _draw_rows(axes: Any, simulation: Simulation, times: Times, row_inches: float) -> None:
    from megallama.train.timeline import BANDS, IDLE, INK, PASSES, lighter

    schedule = simulation.schedule
    end = max(timed[-1].end for timed in simulation.ranks)
    axes.set_xlim(0, end)
    axes.set_ylim(schedule.stages, 0)
    font = min(FONT, 0.6 * 72 * row_inches * HEIGHT)
    points = 72 * (WIDTH - LEFT - RIGHT) / end  # of a unit of time, on paper
    for rank, timed in enumerate(simulation.ranks):
        axes.broken_barh([(0, end)], (rank + GAP, HEIGHT), facecolor=IDLE)
        chunks = schedule.chunks_of(rank)
        boxes: dict[tuple[float, float, str], list[tuple[float, float]]] = defaultdict(list)
        for one, begin, until in (each for action in timed for each in spans(action, times)):
            step, width = chunks.index(one.chunk), until - begin
            for (top, share), colour in zip(BANDS[one.kind], PASSES[one.kind], strict=True):
                key = (rank + GAP + top * HEIGHT, share * HEIGHT, lighter(colour, step))
                boxes[key].append((begin, width))
            number = str(one.micro_batch)
            if points * width > 0.7 * font * len(number) + 2:
                middle = rank + GAP + BANDS[one.kind][0][1] * HEIGHT / 2
                axes.text(
                    begin + width / 2, middle, number, fontsize=font,
                    color=INK if step else "white", ha="center", va="center_baseline",
                )  # fmt: skip
        for (top, share, colour), bars in boxes.items():
            narrowest = points * min(width for _, width in bars)
            edge = 0.5 if narrowest > 3 and row_inches > ROW_INCHES / 2 else 0.0
            axes.broken_barh(bars, (top, share), facecolor=colour, edgecolor="white", lw=edge)
    axes.set_yticks(
        [rank + 0.5 for rank in range(schedule.stages)],
        [f"rank {rank}" for rank in range(schedule.stages)],
        fontsize=min(9.0, 72 * row_inches * 0.7),
    )
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("time")


def _draw_legend(axes: Any, height: float) -> None:
    from matplotlib.patches import Patch

    from megallama.train.timeline import PASSES

    words = {"F": "forward", "B": "backward for activations", "W": "backward for weights"}
    patches = [Patch(facecolor=PASSES[kind][0], label=word) for kind, word in words.items()]
    axes.figure.legend(
        handles=patches, loc="center right", ncols=3, frameon=False, fontsize=10.5,
        bbox_to_anchor=(1 - RIGHT / WIDTH + 0.01, 1 - 0.32 / height), handlelength=1.0,
        columnspacing=1.4,
    )  # fmt: skip
