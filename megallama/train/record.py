"""What a run directory says of its run: config, metrics and the corpus's unigram entropy."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megallama.config.load import read_yaml
from megallama.config.schema import Data, Model, Source
from megallama.errors import ConfigError
from megallama.spec.parameters import parameter_table
from megallama.train.metrics import Row, read_metrics
from megallama.train.trace import Timeline, read_timeline

METRICS, CONFIG = "metrics.jsonl", "config.yaml"
LARGEST = 1e30  # a figure beyond it was written by hand, and its square may not be drawn


@dataclass(frozen=True)
class RunRecord:
    """What a run directory says: rows sorted by step, the last one written for each step."""

    name: str
    steps: list[Row]
    validations: list[Row]
    model: Mapping[str, Any]
    entropy: float | None
    """Unigram entropy of the corpus in nats a token, where every source's sidecar gives it."""
    timeline: Timeline | None = None
    """The newest step that was recorded, if any."""


def read_run(run_dir: Path) -> RunRecord:
    """Read metrics.jsonl, config.yaml and the data's sidecars."""
    run_dir = Path(run_dir)
    way_out = "give a run directory, such as runs/NAME"
    if not run_dir.is_dir():
        raise ConfigError(f"there is no run directory {run_dir}: {way_out}")
    path = run_dir / METRICS
    if not path.is_file():
        raise ConfigError(f"{run_dir} has no metrics.jsonl: {way_out} whose training has started")
    rows = read_metrics(path)
    steps = _latest(row for row in rows if "loss" in row)
    if not steps:
        raise ConfigError(f"{path} has no step yet: wait for the first step, then report again")
    config = _read_config(run_dir / CONFIG)
    return RunRecord(
        name=_text(_section(config, "run").get("name") or run_dir.resolve().name),
        steps=steps,
        validations=_latest(row for row in rows if "validation_loss" in row),
        model=_section(config, "model"),
        entropy=unigram_entropy(_section(config, "data"), int(_figure(steps[-1], "tokens") or 0)),
        timeline=read_timeline(run_dir),
    )


def summarise(run: RunRecord) -> dict[str, Any]:
    """The figures of the page's table; null where unknown."""
    last = run.steps[-1]
    losses = [row["loss"] for row in run.steps if _known(row["loss"])]
    validation = run.validations[-1] if run.validations else {}
    per_source = validation.get("validation_loss_per_source")
    return {
        "name": run.name,
        "steps": last["step"],
        "tokens": _figure(last, "tokens"),
        "final_loss": losses[-1] if losses else None,
        "validation_loss": _figure(validation, "validation_loss"),
        "validation_loss_per_source": (
            {_text(name): loss for name, loss in per_source.items() if _known(loss)}
            if isinstance(per_source, dict)
            else None
        ),
        "unigram_entropy_nats": run.entropy,
        "median_step_seconds": median(run.steps, "step_seconds"),
        "median_tokens_per_second": median(run.steps, "tokens_per_second"),
        "median_tokens_per_second_per_gpu": median(run.steps, "tokens_per_second_per_gpu"),
        "median_tflops_per_gpu": median(run.steps, "tflops_per_gpu"),
        "median_mfu": median(run.steps, "mfu"),
        "peak_memory_bytes": max(
            (row["memory_bytes"] for row in run.steps if _known(row.get("memory_bytes"))),
            default=None,
        ),
        "parameters": count_parameters(run.model),
        "model": dict(run.model),
    }


def unigram_entropy(data: Mapping[str, Any], tokens: int) -> float | None:
    """Mean of the sources' unigram entropies, weighted as the first `tokens` tokens drew on them.

    Each source's figure is `unigram_entropy_nats` of the JSON file PATH.json. None where a source
    has none, or where the section has been edited into no mixture.
    """
    try:
        phases = Data.model_validate(data).all_phases
    except ValueError:
        return None
    total, start = 0.0, 0
    for phase in phases:
        end = min(phase.until_tokens or tokens, tokens)
        share = (end - start) / tokens if tokens else 1.0
        mean = _mixture_entropy(phase.mixture)
        if mean is None:
            return None
        total += share * mean
        start = end
        if start >= tokens:
            break
    return total or None


def count_parameters(model: Mapping[str, Any]) -> int | None:
    """Parameters of a config's `model` section, or None where it is no whole shape."""
    try:
        return sum(parameter.numel for parameter in parameter_table(Model.model_validate(model)))
    except ValueError:
        return None


def column(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values); what is no figure is a gap, NaN."""
    values = [_figure(row, name) for row in rows]
    return (
        np.array([row["step"] for row in rows]),
        np.array([math.nan if value is None else value for value in values], dtype=float),
    )


def _latest(rows: Iterator[Row]) -> list[Row]:
    """By step, the last written of each: a resumed run may have written a step twice."""
    by_step = {row["step"]: row for row in rows}
    return [by_step[step] for step in sorted(by_step)]


def _read_config(path: Path) -> Mapping[str, Any]:
    """The config, or nothing where there is none: the metrics alone make a report too."""
    if not path.exists():
        return {}
    config = read_yaml(path)
    try:
        config = json.loads(json.dumps(config, default=str, skipkeys=True))
    except (ValueError, RecursionError):  # it holds itself, or an endless number
        raise ConfigError(f"{path} is no config: mend it or move it away") from None
    return config if isinstance(config, dict) else {}


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _mixture_entropy(mixture: Sequence[Source]) -> float | None:
    entropies = []
    for source in mixture:
        try:
            sidecar = source.path.with_name(f"{source.path.name}.json").read_text()
            entropies.append(json.loads(sidecar)["unigram_entropy_nats"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
    if not all(map(_known, entropies)):
        return None
    return float(np.average(entropies, weights=[source.weight for source in mixture]))


def median(rows: Sequence[Row], name: str) -> float | None:
    """Without the first step, which warms up, where there are others."""
    values = [row[name] for row in rows[1:] or rows if _known(row.get(name))]
    return statistics.median(values) if values else None


def _known(value: Any) -> bool:
    """Whether it is a number that can be drawn: a row may have been edited by hand."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


def _figure(row: Row, name: str) -> Any:
    value = row.get(name)
    return value if _known(value) else None


def _text(value: object) -> str:
    """As text that a page and a picture can hold: half a surrogate pair and NUL become `?`."""
    return str(value).replace("\0", "?").encode(errors="replace").decode()


def shape_words(model: Mapping[str, Any]) -> str:
    names = {"layers": "layers", "d_model": "wide", "heads": "heads", "vocab": "vocabulary"}
    return ", ".join(f"{_text(model[key])} {word}" for key, word in names.items() if model.get(key))
