"""The console: lines for a file, lines and a bar for a terminal, nothing where quiet."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import pytest

from megallama.train import console
from megallama.train.console import Console, header_line, step_line, validation_line


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def row(step: int, **values: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 2.5,
        "grad_norm": 0.75,
        "lr": 3e-4,
        "step_seconds": 60.0,
        "tokens_per_second": 98765.0,
        "tokens_per_second_per_gpu": 12345.6,
        "tflops_per_gpu": 157.25,
        "mfu": 0.504,
        "memory_bytes": 75 * 2**30,
        **values,
    }


def printed(total: int, every: int, steps: range, **options: Any) -> list[str]:
    out = io.StringIO()
    with Console(total, every, file=out, **options) as lines:
        for step in steps:
            lines.step(row(step))
    return out.getvalue().splitlines()


def steps_of(lines: list[str]) -> list[int]:
    return [int(line.split()[0]) for line in lines if line.split()[0].isdigit()]


def test_the_header_names_the_columns_in_order() -> None:
    names = "step loss grad_norm lr tokens/s/GPU TFLOP/s/GPU MFU memory"
    assert header_line().split() == names.split()
    assert len(header_line()) == 80


def test_a_step_line_shows_the_rows_values_under_the_header() -> None:
    line = step_line(row(40))
    cells = "40 2.5000 0.750 3.00e-04 12,346 157.2 50.4% 75.0 GiB"
    assert line.split() == cells.split()
    for title, cell in (("loss", "2.5000"), ("MFU", "50.4%"), ("memory", "GiB")):
        assert header_line().index(title) + len(title) == line.index(cell) + len(cell)


@pytest.mark.parametrize("unknown", [None, math.nan, math.inf])
def test_what_is_unknown_shows_as_a_dash(unknown: float | None) -> None:
    line = step_line(row(1, loss=unknown, mfu=unknown, memory_bytes=unknown))
    assert line.split() == ["1", "–", "0.750", "3.00e-04", "12,346", "157.2", "–", "–"]


def test_small_figures_keep_their_digits() -> None:
    line = step_line(row(1, tflops_per_gpu=0.01234, memory_bytes=300 * 2**20))
    assert line.split()[5] == "0.0123"
    assert line.endswith("300 MiB")


def test_lines_come_at_the_first_step_every_few_and_the_last() -> None:
    assert steps_of(printed(25, 10, range(1, 26))) == [1, 10, 20, 25]


def test_a_resumed_run_prints_its_first_step() -> None:
    assert steps_of(printed(100, 10, range(33, 51))) == [33, 40, 50]


def test_the_header_comes_back() -> None:
    lines = printed(100, 1, range(1, 42))
    assert [at for at, line in enumerate(lines) if line == header_line()] == [0, 21, 42]


def test_validation_and_messages_are_always_printed() -> None:
    out = io.StringIO()
    with Console(100, 10, file=out) as lines:
        lines.message("saved [bold]runs/demo[/bold] step 7")
        lines.validation({"step": 7, "validation_loss": 3.25})
    assert out.getvalue() == "saved [bold]runs/demo[/bold] step 7\n     7   3.2500  validation\n"


def test_validation_names_its_sources_where_there_are_several() -> None:
    sources = {"web": 3.0, "code": None}
    line = validation_line(
        {"step": 7, "validation_loss": 3.25, "validation_loss_per_source": sources}
    )
    assert line.endswith("validation  web 3.0000, code –")
    one = {"step": 7, "validation_loss": 3.25, "validation_loss_per_source": {"web": 3.25}}
    assert validation_line(one).endswith("validation")


def test_quiet_prints_nothing() -> None:
    for out in (io.StringIO(), Terminal()):
        with Console(10, 1, quiet=True, file=out) as lines:
            lines.step(row(1))
            lines.validation({"step": 1, "validation_loss": 3.0})
            lines.message("hello")
        assert out.getvalue() == ""


def test_a_file_gets_no_control_characters() -> None:
    out = io.StringIO()
    with Console(3, 1, file=out) as lines:
        for step in (1, 2, 3):
            lines.step(row(step))
    assert "\x1b" not in out.getvalue()
    assert "\r" not in out.getvalue()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(console, "REFRESH_SECONDS", 0.0)
    return Terminal()


def test_a_terminal_gets_lines_and_a_bar(terminal: Terminal) -> None:
    with Console(30, 10, file=terminal) as lines:
        for step in range(1, 21):
            lines.step(row(step))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert step_line(row(10)) in text
    assert "20/30 ━" in text
    # Ten steps of a minute to go.
    assert "loss 2.500  98,765 tokens/s  ETA 0:10:00" in text
    assert terminal.getvalue().rstrip("\r").endswith("\x1b[2K")  # the bar is taken down


def test_the_time_left_of_a_resumed_run_counts_its_own_steps(terminal: Terminal) -> None:
    with Console(5000, 1000, file=terminal) as lines:
        lines.step(row(4000, step_seconds=120.0))
    assert "ETA 1d 9:20:00" in terminal.getvalue()


def test_the_bar_is_taken_down_when_training_fails(terminal: Terminal) -> None:
    def train() -> None:
        with Console(30, 10, file=terminal) as lines:
            lines.step(row(1))
            assert "\x1b[?25h" not in terminal.getvalue()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert "\x1b[?25l" in terminal.getvalue()  # the cursor was hidden
    assert "\x1b[?25h" in terminal.getvalue()  # and is back


def test_an_output_that_is_not_unicode_takes_lines() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    with Console(1, 1, file=out) as lines:
        lines.step(row(1, mfu=None))
    assert b"157.2      ?" in raw.getvalue()


def test_an_output_that_is_gone_does_not_end_training() -> None:
    class Gone(io.StringIO):
        calls = 0

        def write(self, text: str) -> int:
            self.calls += 1
            raise BrokenPipeError

    out = Gone()
    with Console(3, 1, file=out) as lines:
        lines.step(row(1))
        lines.step(row(2))
        lines.message("hello")
    assert out.calls == 1
