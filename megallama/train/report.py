"""A run's report: one picture of four panels and one self-contained page, from its metrics.jsonl.

The unigram entropy of the corpus, drawn beside the loss, is what a model that knows only how often
each token occurs would reach: a loss below it shows that context is being used.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megallama.config.schema import Model
from megallama.errors import ConfigError
from megallama.files import write_atomic
from megallama.spec.parameters import parameter_table
from megallama.train.metrics import Row, read_metrics

SMOOTH_ABOVE = 100  # points: a smoothed line over the raw one from here on
INK, MUTED, GRID = "#1f2933", "#6b7785", "#e6eaee"
BLUE, PALE_BLUE, ORANGE = "#1f5fa8", "#b5cfec", "#d9691e"
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


@dataclass(frozen=True)
class RunRecord:
    """What a run directory says: rows sorted by step, the last one written for each step."""

    name: str
    steps: list[Row]
    validations: list[Row]
    model: Mapping[str, Any]
    entropy: float | None
    """Unigram entropy of the corpus in nats a token, where every source's sidecar gives it."""


def write_report(run_dir: Path) -> Path:
    """Write RUN_DIR/report/loss.png and index.html; returns the page's path.

    Raises ConfigError where the directory holds no metrics.
    """
    run = read_run(run_dir)
    picture = draw(run)
    page = Path(run_dir) / "report" / "index.html"
    try:
        page.parent.mkdir(exist_ok=True)
        write_atomic(page.with_name("loss.png"), picture)
        write_atomic(page, render_page(run, picture).encode())
    except OSError as error:
        raise ConfigError(
            f"cannot write {page.parent} ({error.strerror}): make it writable, or copy {run_dir}"
        ) from error
    return page


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
        "median_tokens_per_second": _median(run.steps, "tokens_per_second"),
        "median_tokens_per_second_per_gpu": _median(run.steps, "tokens_per_second_per_gpu"),
        "median_tflops_per_gpu": _median(run.steps, "tflops_per_gpu"),
        "median_mfu": _median(run.steps, "mfu"),
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


def smooth(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(indices, medians): a moving median over 4% of the points, at about 600 of them.

    A median, since one spike would draw a mean into a box. The window is narrow at the start, where
    a loss falls steeply, and one-sided at the end. Gaps (NaN) are left out.
    """
    count = len(values)
    spread = np.concatenate([np.geomspace(1, count, 200) - 1, np.linspace(0, count - 1, 400)])
    at = np.unique(spread.round().astype(int))
    half = max(2, count // 50)
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


# The picture


def draw(run: RunRecord) -> bytes:
    """The PNG: loss over learning rate, gradient norm and throughput, all against the step."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 7.6), dpi=160, facecolor="white")
        grid = figure.add_gridspec(
            2, 3, height_ratios=(1.75, 1), hspace=0.44, wspace=0.24,
            left=0.06, right=0.98, top=0.835, bottom=0.085,
        )  # fmt: skip
        figure.text(0.06, 0.957, run.name, fontsize=18, fontweight="bold", va="center")
        figure.text(0.06, 0.915, _subtitle(run), fontsize=11, color=MUTED, va="center")
        _draw_loss(figure.add_subplot(grid[0, :]), run)
        _draw_lr(figure.add_subplot(grid[1, 0]), run)
        _draw_grad_norm(figure.add_subplot(grid[1, 1]), run)
        _draw_throughput(figure.add_subplot(grid[1, 2]), run)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_loss(axes: Any, run: RunRecord) -> None:
    figures = summarise(run)
    steps, losses = _column(run.steps, "loss")
    _curve(axes, steps, losses, _with_value("training", figures["final_loss"]))
    shown = [losses]
    if run.validations:
        at, values = _column(run.validations, "validation_loss")
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
        loc="lower right", bbox_to_anchor=(1.008, 0.985), ncols=2, frameon=False, fontsize=10.5
    )


def _draw_lr(axes: Any, run: RunRecord) -> None:
    steps, rates = _column(run.steps, "lr")
    _curve(axes, steps, rates, smoothed=False)
    if np.isfinite(rates).any():
        axes.set_ylim(0, (np.nanmax(rates) or 1.0) * 1.12)
    axes.yaxis.set_major_formatter(lambda value, _: _scientific(value))
    _label(axes, "learning rate", f"peak {_scientific(np.nanmax(rates, initial=0))}")


def _draw_grad_norm(axes: Any, run: RunRecord) -> None:
    steps, norms = _column(run.steps, "grad_norm")
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
    steps, speeds = _column(rows, "tokens_per_second")
    _curve(axes, steps, speeds)
    _limit(axes, [speeds], floor=0)
    axes.yaxis.set_major_formatter(lambda value, _: _short(value))
    median, mfu = _median(run.steps, "tokens_per_second"), _median(run.steps, "mfu")
    words = [f"median {_short(median)}"] if median is not None else []
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
        at, values = smooth(values)
        steps = steps[at]
    axes.plot(steps, values, color=BLUE, lw=2, marker=marker, ms=4.5, label=label)
    if first == last:
        first, last = 0, 2 * last
    axes.set_xlim(0 if first < 0.05 * last else first, last * 1.005)
    axes.xaxis.set_major_locator(_whole_steps())
    axes.xaxis.set_major_formatter(lambda value, _: _short(value))
    axes.set_xlabel("step")


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


# The page


def render_page(run: RunRecord, picture: bytes) -> str:
    """One HTML file that needs nothing else: the picture is inside, there is no script."""
    rows = "\n".join(
        f"<tr><th>{html.escape(title)}</th><td>{html.escape(value)}</td></tr>"
        for title, value in _table(summarise(run))
    )
    return PAGE.format(
        name=html.escape(run.name),
        subtitle=html.escape(_subtitle(run)),
        rows=rows,
        picture=base64.b64encode(picture).decode(),
    )


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1f2933; background: #fff; margin: 2.5rem auto;
  max-width: 1200px; padding: 0 1.5rem; }}
h1 {{ margin: 0; font-size: 1.7rem; }}
p {{ margin: 0 0 1.5rem; color: #6b7785; }}
img {{ width: 100%; border: 1px solid #e6eaee; border-radius: 6px; }}
table {{ border-collapse: collapse; margin-top: 1.5rem; }}
th, td {{ text-align: left; padding: .4rem 2.5rem .4rem 0; border-bottom: 1px solid #e6eaee; }}
th {{ font-weight: normal; color: #6b7785; }}
td {{ font-variant-numeric: tabular-nums; }}
</style>
<h1>{name}</h1>
<p>{subtitle}</p>
<img alt="loss, learning rate, gradient norm and throughput of {name}"
  src="data:image/png;base64,{picture}">
<table>
{rows}
</table>
</html>
"""


def _table(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(title, value) of every figure that is known."""
    lines: list[tuple[str, Any, Callable[[Any], str]]] = [
        ("final loss", figures["final_loss"], _nats),
        ("validation loss", figures["validation_loss"], _nats),
    ]
    per_source = figures["validation_loss_per_source"] or {}
    if len(per_source) > 1:
        lines += [(f"validation loss, {name}", loss, _nats) for name, loss in per_source.items()]
    lines += [
        ("unigram entropy of the corpus", figures["unigram_entropy_nats"], _nats),
        ("steps", figures["steps"], "{:,}".format),
        ("tokens", figures["tokens"], "{:,}".format),
        ("median tokens/s", figures["median_tokens_per_second"], "{:,.0f}".format),
        ("median tokens/s/GPU", figures["median_tokens_per_second_per_gpu"], "{:,.0f}".format),
        ("median TFLOP/s/GPU", figures["median_tflops_per_gpu"], "{:,.3g}".format),
        ("median MFU", figures["median_mfu"], "{:.1%}".format),
        ("peak memory", figures["peak_memory_bytes"], lambda b: f"{b / 2**30:.2f} GiB"),
        ("model", _shape(figures["model"]) or None, str),
        ("parameters", figures["parameters"], "{:,}".format),
    ]
    return ((title, form(value)) for title, value, form in lines if value is not None)


# Reading


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


def _column(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values); a null is a gap, NaN."""
    values = [row.get(name) for row in rows]
    return (
        np.array([row["step"] for row in rows]),
        np.array([math.nan if value is None else value for value in values], dtype=float),
    )


def _known(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _median(rows: Sequence[Row], name: str) -> float | None:
    """Without the first step, which warms up, where there are others."""
    values = [row[name] for row in rows[1:] or rows if _known(row.get(name))]
    return statistics.median(values) if values else None


# Words


def _subtitle(run: RunRecord) -> str:
    figures = summarise(run)
    parameters, tokens = figures["parameters"], figures["tokens"]
    parts = [_shape(run.model)]
    if parameters:
        parts.append(f"{_short(parameters)} parameters")
    if tokens:
        parts.append(f"{_short(tokens)} tokens")
    return " · ".join(part for part in parts if part)


def _shape(model: Mapping[str, Any]) -> str:
    names = {"layers": "layers", "d_model": "wide", "heads": "heads", "vocab": "vocabulary"}
    return ", ".join(f"{model[key]} {word}" for key, word in names.items() if model.get(key))


def _nats(value: float) -> str:
    return f"{value:.4f} nats"


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
