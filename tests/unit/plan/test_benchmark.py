"""`benchmarks/predictions.py`: its rows, without the measurement."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from megallama.config.load import parse_config
from megallama.plan.hardware import load_hardware
from megallama.plan.ledger import ledger
from megallama.plan.predict import predict
from megallama.spec.grid import make_grid

PATH = Path(__file__).parents[3] / "benchmarks" / "predictions.py"
BENCHMARK = runpy.run_path(str(PATH))


def test_a_text_that_is_in_no_row_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(PATH), "--only", "nothing"])
    with pytest.raises(SystemExit, match="--only nothing: is in no row") as ended:
        BENCHMARK["main"]()
    assert "\n" not in str(ended.value)


def test_rows_are_chosen_by_their_text() -> None:
    chosen, rows = BENCHMARK["chosen"], BENCHMARK["COMBINATIONS"]
    assert [(model, keys) for model, each in chosen("").items() for keys in each] == [*rows]
    assert chosen("gpipe") == {"D=256, 6 layers": ["parallel.pipeline=2 parallel.schedule=gpipe"]}


def test_a_row_has_both_memories_each_under_its_own_name() -> None:
    values = BENCHMARK["config_of"]("D=256, 6 layers") | {"parallel": {"pipeline": 2}}
    config, machine = parse_config(values), load_hardware("cpu")
    seconds = {"min": 1.0, "median": 2.0, "max": 3.0}
    figures = {"step_seconds": seconds, "exposed_seconds": {}, "peak_memory_bytes": 7 << 20}
    row = BENCHMARK["beside"](config, machine, figures, 100 << 20)
    assert row["error"] == predict(config, machine, 2).step_seconds / 2 - 1
    held = ledger(config, make_grid(config, 2), machine).largest.held
    assert (row["predicted_tensor_bytes"], row["measured_resident_bytes"]) == (held, 7 << 20)
    assert row["memory_error"] == held / (100 << 20) - 1
    text = BENCHMARK["line"]({"model": "a", "layout": "b", **row})
    words = f"{held / 2**20:,.0f} MiB predicted, 100 held, {row['memory_error']:+.2%}"
    assert text.endswith(f"tensors {words}; process 7 MiB")
