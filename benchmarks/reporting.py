"""What the benchmarks' reports have in common."""

from __future__ import annotations

import datetime
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megallama.kernels import native
from megallama.train.doctor import processor, versions


def spread(values: Iterable[float], digits: int = 5) -> dict[str, Any]:
    """Median, least and greatest of the rounds, and each."""
    rounds = [round(value, digits) for value in values]
    return dict(
        median=round(statistics.median(rounds), digits),
        min=min(rounds),
        max=max(rounds),
        rounds=rounds,
    )


def about(script: str) -> dict[str, Any]:
    """When, how and on what `script` was run."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
        "hardware": processor(),
        "versions": versions(),
    }


def cpu_variant() -> str:
    """The kernels' variant for the CPU, such as `avx512`."""
    module = native.variants().get("cpu")
    return module.__name__.rpartition(".")[2] if module else "reference"


def save(path: Path | None, report: dict[str, Any]) -> None:
    """Write the report, where a path is given."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")
