"""What a training run says on the terminal: one line every few steps, and a progress bar.

The lines are columns under a header that comes back every 20 lines: `step loss grad_norm lr
tokens/s/GPU TFLOP/s/GPU MFU memory`. A terminal also gets a bar with the loss, tokens/s and the
time left; a file or a pipe gets the lines only. Values are those of the rows of metrics.jsonl.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, TextIO

import rich.console
from rich.progress import BarColumn, Progress, TextColumn

NONE = "–"
HEADER_EVERY = 20
REFRESH_SECONDS = 0.25
#: (title, width): the value is right-aligned under the title.
COLUMNS = (
    ("step", 6),
    ("loss", 7),
    ("grad_norm", 9),
    ("lr", 8),
    ("tokens/s/GPU", 12),
    ("TFLOP/s/GPU", 11),
    ("MFU", 5),
    ("memory", 8),
)


class Console:
    """Prints rows as they come. `quiet` prints nothing: for every rank but one.

    Use as a context manager, so that the bar is taken down when training ends or fails.
    """

    def __init__(
        self, total_steps: int, log_every: int, quiet: bool = False, file: TextIO | None = None
    ) -> None:
        self._total = total_steps
        self._log_every = max(1, log_every)
        self._quiet = quiet
        self._out = rich.console.Console(file=file or sys.stdout, highlight=False)
        self._bar = _Bar(self._out, total_steps) if self._out.is_terminal and not quiet else None
        self._first = True
        self._lines = 0

    def step(self, row: Mapping[str, Any]) -> None:
        """A step row: moves the bar; a line at the first step, the last, and every `log_every`."""
        step = int(row["step"])
        lines = []
        if self._first or step % self._log_every == 0 or step == self._total:
            if self._lines % HEADER_EVERY == 0:
                lines.append(header_line())
            self._lines += 1
            lines.append(step_line(row))
        self._first = False
        self._show(lines, row)

    def validation(self, row: Mapping[str, Any]) -> None:
        """A validation row: always a line."""
        self._show([validation_line(row)])

    def message(self, text: str) -> None:
        """Any other line."""
        self._show([text])

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            with suppress(OSError):
                self._bar.stop()

    def _show(self, lines: list[str], row: Mapping[str, Any] | None = None) -> None:
        if self._quiet:
            return
        try:
            for line in lines:
                self._print(line)
            if self._bar and row is not None:
                self._bar.advance(row)
        except OSError:  # the terminal or pipe is gone; metrics.jsonl has all that it would show
            self._quiet = True

    def _print(self, line: str) -> None:
        encoding = self._out.encoding
        line = line.encode(encoding, "replace").decode(encoding)
        if self._bar:
            self._out.print(line, markup=False, soft_wrap=True)
        else:  # as it is: rich would cut and pad
            print(line, file=self._out.file, flush=True)


def header_line() -> str:
    return "  ".join(title.rjust(width) for title, width in COLUMNS)


def step_line(row: Mapping[str, Any]) -> str:
    """One line of columns; a value that is null or not finite shows as `–`."""
    cells = (
        str(row["step"]),
        _number(row.get("loss"), ".4f"),
        _number(row.get("grad_norm"), ".3f"),
        _number(row.get("lr"), ".2e"),
        _number(row.get("tokens_per_second_per_gpu"), ",.0f"),
        _number(row.get("tflops_per_gpu"), ".1f", small=".3g"),
        _number(row.get("mfu"), ".1%"),
        _memory(row.get("memory_bytes")),
    )
    return "  ".join(cell.rjust(width) for cell, (_, width) in zip(cells, COLUMNS, strict=True))


def validation_line(row: Mapping[str, Any]) -> str:
    """`STEP  LOSS  validation`, and the loss of each source where there are several."""
    sources = row.get("validation_loss_per_source") or {}
    parts = [f"{row['step']:>6}", f"{_number(row.get('validation_loss'), '.4f'):>7}", "validation"]
    if len(sources) > 1:
        parts.append(", ".join(f"{name} {_number(loss, '.4f')}" for name, loss in sources.items()))
    return "  ".join(parts)


class _Bar:
    """The progress bar, drawn from `advance` at most four times a second: it has no thread."""

    def __init__(self, out: rich.console.Console, total_steps: int) -> None:
        self._progress = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[text]}"),
            console=out,
            auto_refresh=False,
            transient=True,
            expand=True,
        )
        self._task = self._progress.add_task("", total=total_steps, text="")
        self._total = total_steps
        self._seconds: deque[float] = deque(maxlen=50)
        self._drawn = -math.inf

    def advance(self, row: Mapping[str, Any]) -> None:
        step, now = int(row["step"]), time.monotonic()
        if row.get("step_seconds") is not None:
            self._seconds.append(float(row["step_seconds"]))
        if now - self._drawn < REFRESH_SECONDS and step < self._total:
            return
        self._drawn = now
        text = (
            f"loss {_number(row.get('loss'), '.3f')}  "
            f"{_number(row.get('tokens_per_second'), ',.0f')} tokens/s  "
            f"ETA {self._time_left(step)}"
        )
        self._progress.update(self._task, completed=step, text=text)
        if not self._progress.live.is_started:
            self._progress.start()
        self._progress.refresh()

    def stop(self) -> None:
        self._progress.stop()

    def _time_left(self, step: int) -> str:
        """The steps to go at the median of the last 50: a resumed run's first figure is right."""
        if not self._seconds:
            return NONE
        seconds = round(statistics.median(self._seconds) * (self._total - step))
        days, hours = divmod(seconds // 3600, 24)
        clock = f"{hours}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        return f"{days}d {clock}" if days else clock


def _number(value: float | None, form: str, small: str | None = None) -> str:
    if value is None or not math.isfinite(value):
        return NONE
    return format(value, small if small and abs(value) < 1 else form)


def _memory(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return NONE
    if value >= 2**30:
        return f"{value / 2**30:.1f} GiB"
    return f"{value / 2**20:.0f} MiB"
