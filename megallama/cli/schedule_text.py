"""A simulated schedule in the terminal: a line a rank, then its figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megallama.cli.schedule_json import Times, spans
from megallama.spec.schedules.actions import Compute
from megallama.spec.schedules.simulate import Simulation

IDLE = "·"
#: Backgrounds of F, B and W by chunk of the rank, each paler than the one before; a picture's hues.
SHADES = {
    "F": ("#1f5fa8", "#7fa8d6", "#a9c5e6", "#cfdff2"),
    "B": ("#d9691e", "#eda97c", "#f4c7a8", "#f9e0d0"),
    "W": ("#3a8f4d", "#8cc29a", "#b3d7bc", "#d6eadb"),
}
WORDS = {"F": "forward", "B": "backward for activations", "W": "backward for weights"}
LEAST_WIDTH = 10  # a terminal that is narrower still cuts the lines

#: (what stands in a column, its style)
Cell = tuple[str, str]


def show(simulation: Simulation, times: Times, console: Console) -> None:
    """Print the timeline, as wide as the terminal lets it be, and the figures under it."""
    coloured = console.color_system is not None and not console.no_color
    schedule = simulation.schedule
    margin = len(f"rank {schedule.stages - 1} ")
    scale = columns_per_unit(simulation, max(LEAST_WIDTH, console.width - margin))
    for rank in range(schedule.stages):
        line = Text().append(f"rank {rank} ".ljust(margin), style="bold")
        for style, cells in groupby(row(simulation, times, rank, scale, coloured), lambda c: c[1]):
            line.append("".join(text for text, _ in cells), style=style)
        console.print(line, no_wrap=True, overflow="crop")
    console.print(_axis(simulation, margin, scale), style="dim", no_wrap=True, overflow="crop")
    console.print(_legend(schedule.chunks // schedule.stages))
    console.print()
    _show_figures(console, simulation)


def columns_per_unit(simulation: Simulation, width: int) -> float:
    """Columns of a unit of time: all fits into `width`, and so does the longest label into the
    shortest pass if there is room; a whole number of columns a pass where that is one or more."""
    end = max(timed[-1].end for timed in simulation.ranks)
    lengths = [each.end - each.start for timed in simulation.ranks for each in timed]
    shortest = min(length for length in lengths if length > 0)
    most = len(str(simulation.schedule.micro_batches - 1)) + 2  # its letter, and a space
    columns = min(most, width * shortest / end)
    return (math.floor(columns) if columns >= 1 else columns) / shortest


def row(
    simulation: Simulation, times: Times, rank: int, scale: float, coloured: bool
) -> Iterator[Cell]:
    """A rank's columns. A column shows the pass at its middle."""
    chunks = simulation.schedule.chunks_of(rank)
    at = 0
    for each in simulation.ranks[rank]:
        first, last = (math.ceil(scale * time - 0.5) for time in (each.start, each.end))
        yield from [(IDLE, "dim")] * (first - at)
        at = max(at, last)
        parts = [one for one, _, _ in spans(each, times)]
        numbers = coloured and len(str(simulation.schedule.micro_batches - 1)) <= last - first
        text = _label(parts, chunks, last - first, numbers).ljust(last - first)
        shades = _shades(parts, chunks, times, last - first)
        yield from zip(text, shades, strict=True)


def _label(parts: Sequence[Compute], chunks: Sequence[int], width: int, numbers: bool) -> str:
    """The most telling text that fits: kind and micro-batch; with `numbers`, where colours tell the
    kind, the micro-batch alone; a letter. Small letters are a rank's second and fourth chunk."""

    def kind(one: Compute) -> str:
        return one.kind.lower() if chunks.index(one.chunk) % 2 else one.kind

    texts = ["+".join(f"{kind(one)}{one.micro_batch}" for one in parts)]
    if numbers:
        texts.append("+".join(str(one.micro_batch) for one in parts))
    texts.append("+".join(kind(one) for one in parts))
    texts.append("".join(kind(one) for one in parts)[:width])
    return next(text for text in texts if len(text) <= width)


def _shades(parts: Sequence[Compute], chunks: Sequence[int], times: Times, width: int) -> list[str]:
    """The style of each column: a pass that does two things has both colours, as long as each
    takes."""
    seconds = dict(zip("FBW", times, strict=True))
    kinds = [(kind, one) for one in parts for kind in one.kind]
    whole = sum(seconds[kind] for kind, _ in kinds)
    found: list[str] = []
    done = 0.0
    for kind, one in kinds:
        done += seconds[kind]
        local = chunks.index(one.chunk)
        shade = SHADES[kind][min(local, len(SHADES[kind]) - 1)]
        style = f"{'black' if local else 'white'} on {shade}"
        end = round(width * done / whole) if whole else 0
        found += [style] * (end - len(found))
    return found


def _axis(simulation: Simulation, margin: int, scale: float) -> str:
    """From 0 to the end, with as many columns as the timeline has."""
    end = max(timed[-1].end for timed in simulation.ranks)
    last = f" {end:g}"
    width = math.ceil(scale * end - 0.5)
    return " " * (margin - 2) + "0 " + "─" * (width - len(last)) + last


def _legend(chunks_per_rank: int) -> Text:
    line = Text()
    for kind, word in WORDS.items():
        line.append(f" {kind} ", style=f"white on {SHADES[kind][0]}")
        line.append(f" {word}  ")
    line.append(f"{IDLE} idle")
    if chunks_per_rank > 1:
        line.append("\nSmall letters, paler: a rank's second chunk")
        line.append("." if chunks_per_rank == 2 else "; capitals and small ones by turns after it.")
    return line


def _show_figures(console: Console, simulation: Simulation) -> None:
    schedule = simulation.schedule
    chunks = schedule.chunks // schedule.stages
    console.print(
        f"{schedule.name}: {schedule.stages} stages"
        + (f" x {chunks} chunks" if chunks > 1 else "")
        + f", {schedule.micro_batches} micro-batches"
    )
    console.print(f"bubble fraction  {simulation.bubble_fraction:.4f}")
    console.print(f"makespan         {simulation.makespan:g}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    held = "micro-batches" if chunks == 1 else "chunks x micro-batches"
    for title in ("rank", f"{held}\nheld F to B", f"{held}\nheld B to W", "activation\nmemory"):
        table.add_column(title, justify="right")
    for rank, figures in enumerate(
        zip(
            simulation.peak_in_flight,
            simulation.peak_weight_states,
            simulation.activation_memory,
            strict=True,
        )
    ):
        table.add_row(str(rank), *(f"{figure:g}" for figure in figures))
    console.print(table)
    console.print(
        "activation memory: in what a rank's whole share saves of one micro-batch", style="dim"
    )
