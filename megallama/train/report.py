"""A run's report: one picture and one self-contained page, from its metrics.jsonl and, where a
step was recorded, its timeline.

The unigram entropy of the corpus, drawn beside the loss, is what a model that knows only how often
each token occurs would reach: a loss below it shows that context is being used.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megallama.files import write_atomic
from megallama.train.comparison import Comparison
from megallama.train.picture import draw, subtitle
from megallama.train.record import RunRecord, shape_words, summarise
from megallama.train.trace import FOLDER, Timeline, timeline_name

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
<img alt="{shown} of {name}"
  src="data:image/png;base64,{picture}">
<table>
{rows}
</table>
</html>
"""


def write_report(
    run_dir: Path,
    run: RunRecord,
    comparison: Comparison | None = None,
    prediction: str = "",
    beside: Timeline | None = None,
) -> Path:
    """Write RUN_DIR/report/loss.png and index.html; returns the page's path.

    `prediction`: what the planner says of the run, for the table; `beside`: the recorded step with
    the predicted one, for the picture.

    Raises ConfigError where they cannot be written.
    """
    picture = draw(run, comparison.other if comparison else None, beside)
    page = Path(run_dir) / "report" / "index.html"
    write_atomic(page.with_name("loss.png"), picture)
    write_atomic(page, render_page(run, picture, comparison, prediction).encode())
    return page


def render_page(
    run: RunRecord, picture: bytes, comparison: Comparison | None = None, prediction: str = ""
) -> str:
    """One HTML file that needs nothing else: the picture is inside, there is no script."""
    lines = list(_table(summarise(run)))
    shown = "loss, learning rate, gradient norm and throughput"
    if run.timeline:
        lines.append(("recorded step", _recorded(run.timeline)))
        shown = f"loss, one step's timeline, {shown.partition(', ')[2]}"
    if comparison:
        lines.append(("comparison", str(comparison)))
    if prediction:
        lines.append(("predicted step", prediction))
    rows = "\n".join(
        f"<tr><th>{html.escape(title)}</th><td>{html.escape(value)}</td></tr>"
        for title, value in lines
    )
    return PAGE.format(
        name=html.escape(run.name),
        subtitle=html.escape(subtitle(run)),
        shown=shown,
        rows=rows,
        picture=base64.b64encode(picture).decode(),
    )


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
        ("median step", figures["median_step_seconds"], "{:.3g} s".format),
        ("median tokens/s", figures["median_tokens_per_second"], "{:,.0f}".format),
        ("median tokens/s/GPU", figures["median_tokens_per_second_per_gpu"], "{:,.0f}".format),
        ("median TFLOP/s/GPU", figures["median_tflops_per_gpu"], "{:,.3g}".format),
        ("median MFU", figures["median_mfu"], "{:.1%}".format),
        ("peak memory", figures["peak_memory_bytes"], lambda b: f"{b / 2**30:.2f} GiB"),
        ("model", shape_words(figures["model"]) or None, str),
        ("parameters", figures["parameters"], "{:,}".format),
    ]
    return ((title, form(value)) for title, value, form in lines if value is not None)


def _recorded(timeline: Timeline) -> str:
    count = len(timeline.ranks)
    ranks = f"{count} rank" + "s" * (count > 1)
    return (
        f"step {timeline.step}, {1e3 * timeline.seconds:,.0f} ms on {ranks}; "
        f"{FOLDER}/{timeline_name(timeline.step)} opens in Perfetto"
    )


def _nats(value: float) -> str:
    return f"{value:.4f} nats"
