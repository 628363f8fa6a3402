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
import yaml

from megallama.config.schema import Model
from megallama.errors import ConfigError
from megallama.spec.parameters import parameter_table
from megallama.train.metrics import Row, read_metrics


@dataclass(frozen=True)
class RunRecord:
    """What a run directory says: rows sorted by step, the last one written for each step."""

    name: str
    steps: list[Row]
    validations: list[Row]
    model: Mapping[str, Any]
    entropy: float | None
    """Unigram entropy of the corpus in nats a token, where every source's sidecar gives it."""


def read_run(run_dir: Path) -> RunRecord:
    """Read metrics.jsonl, config.yaml and the data's sidecars."""
    run_dir = Path(run_dir)
    way_out = "give a run directory, such as runs/NAME"
    if not run_dir.is_dir():
        raise ConfigError(f"there is no run directory {run_dir}: {way_out}")
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise ConfigError(f"{run_dir} has no metrics.jsonl: {way_out} whose training has started")
    rows = read_metrics(path)
    steps = _latest(row for row in rows if "loss" in row)
    if not steps:
        raise ConfigError(f"{path} has no step yet: wait for the first step, then report again")
    config = _read_config(run_dir / "config.yaml")
    return RunRecord(
        name=str(_section(config, "run").get("name") or run_dir.resolve().name),
        steps=steps,
        validations=_latest(row for row in rows if "validation_loss" in row),
        model=_section(config, "model"),
        entropy=unigram_entropy(_section(config, "data"), steps[-1].get("tokens") or 0),
    )


def summarise(run: RunRecord) -> dict[str, Any]:
    """The figures of the page's table; null where unknown."""
    last = run.steps[-1]
    losses = [row["loss"] for row in run.steps if _known(row["loss"])]
    validation = run.validations[-1] if run.validations else {}
    return {
        "name": run.name,
        "steps": last["step"],
        "tokens": last.get("tokens"),
        "final_loss": losses[-1] if losses else None,
        "validation_loss": validation.get("validation_loss"),
        "validation_loss_per_source": validation.get("validation_loss_per_source"),
        "unigram_entropy_nats": run.entropy,
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
    has none.
    """
    phases = data.get("phases") or [{"mixture": data.get("mixture") or []}]
    total, start = 0.0, 0
    for phase in phases:
        end = min(int(phase.get("until_tokens") or tokens), tokens)
        share = (end - start) / tokens if tokens else 1.0
        mean = _mixture_entropy(phase.get("mixture") or [])
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
    """(steps, values); a null is a gap, NaN."""
    values = [row.get(name) for row in rows]
    return (
        np.array([row["step"] for row in rows]),
        np.array([math.nan if value is None else value for value in values], dtype=float),
    )


def _latest(rows: Iterator[Row]) -> list[Row]:
    """By step, the last written of each: a resumed run may have written a step twice."""
    by_step = {int(row["step"]): row for row in rows}
    return [by_step[step] for step in sorted(by_step)]


def _read_config(path: Path) -> Mapping[str, Any]:
    """The config, or nothing where there is none: the metrics alone make a report too."""
    try:
        config = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is not YAML ({reason}): mend it or move it away") from error
    return config if isinstance(config, dict) else {}


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _mixture_entropy(mixture: Sequence[Mapping[str, Any]]) -> float | None:
    weights, entropies = [], []
    for source in mixture:
        try:
            prefix = Path(source["path"])
            sidecar = json.loads(prefix.with_name(f"{prefix.name}.json").read_text())
            entropies.append(float(sidecar["unigram_entropy_nats"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        weights.append(float(source.get("weight", 1)))
    return float(np.average(entropies, weights=weights)) if weights else None


def median(rows: Sequence[Row], name: str) -> float | None:
    """Without the first step, which warms up, where there are others."""
    values = [row[name] for row in rows[1:] or rows if _known(row.get(name))]
    return statistics.median(values) if values else None


def _known(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def shape_words(model: Mapping[str, Any]) -> str:
    names = {"layers": "layers", "d_model": "wide", "heads": "heads", "vocab": "vocabulary"}
    return ", ".join(f"{model[key]} {word}" for key, word in names.items() if model.get(key))
