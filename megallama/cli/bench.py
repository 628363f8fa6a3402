"""Time training steps of a config, in one layout or several, on its data or on synthetic tokens."""

from __future__ import annotations

import argparse
import json
import shlex
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megallama.config.schema import Config
    from megallama.plan.hardware import Hardware
    from megallama.train.process import Process
    from megallama.train.signals import StopSignals

SECONDS_A_DAY = 86_400
PIPE_WIDTH = 160


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="local workers")
    parser.add_argument(
        "--steps", type=int, default=10, metavar="N", help="timed steps (default 10)"
    )
    parser.add_argument(
        "--warmup", type=int, default=3, metavar="N", help="steps before them (default 3)"
    )
    parser.add_argument(
        "--layout",
        action="append",
        default=[],
        metavar="'KEY=VALUE …'",
        help="keys of a layout, such as 'parallel.tensor=2 parallel.overlap=full'; give it again "
        "for each layout to compare",
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME|FILE.yaml",
        help="put what `megallama plan` predicts for this machine beside the figures",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures here")
    parser.epilog = (
        "mfu counts 6·L·[(2+2K/H)·D²+3·D·F] + 6·V·D + 6·L·D·S FLOPs a token (causal attention "
        "half), mfu_6n counts 6·parameters; both are null where the device's peak is unknown. "
        "exposed is what a rank waits for a group in a step. With --layout the JSON is "
        "{layouts: […]}."
    )


def run(args: argparse.Namespace) -> int:
    """Print the figures, and write them with --json."""
    from megallama.config.load import load_config
    from megallama.errors import EXIT_DONE, ConfigError
    from megallama.files import refuse_overwriting, write_atomic

    if args.steps < 1 or args.warmup < 0:
        raise ConfigError(f"--steps {args.steps} --warmup {args.warmup}: at least 1 and 0")
    from megallama.plan.hardware import load_hardware
    from megallama.spec.grid import make_grid
    from megallama.train.launch import launch

    hardware = load_hardware(args.gpu) if args.gpu else None

    def prepare(processes: int) -> list[Config]:
        if args.json:
            refuse_overwriting([args.json], [args.config])
        configs = [
            load_config(args.config, [*args.overrides, *_words(layout)])
            for layout in args.layout or [""]
        ]
        for config in configs:
            make_grid(config, processes)
        return configs

    def work(configs: list[Config], process: Process, stop: StopSignals) -> int:
        from megallama.train.bench import bench_layouts

        figures = bench_layouts(configs, args.steps, args.warmup, process)
        if process.rank:
            return EXIT_DONE
        if hardware:
            for config, row in zip(configs, figures, strict=True):
                row["predicted"] = predicted(config, hardware, process.size)
        show(configs, args.layout, figures)
        if args.json:
            content = {"layouts": figures} if args.layout else figures[0]
            write_atomic(args.json, json.dumps(content, indent=2).encode() + b"\n")
        return EXIT_DONE

    return launch(args.nproc, prepare, work)


def _words(layout: str) -> list[str]:
    """A layout's overrides. Raises ConfigError at a quote that is not closed."""
    from megallama.errors import ConfigError

    try:
        return shlex.split(layout)
    except ValueError as error:
        raise ConfigError(f"--layout {layout!r}: {error}; give section.key=value words") from None


def predicted(config: Config, hardware: Hardware, gpus: int) -> dict[str, Any]:
    """The planner's figures of a layout: seconds, and bytes of the largest rank's tensors."""
    from megallama.plan.ledger import ledger
    from megallama.plan.predict import predict
    from megallama.spec.grid import make_grid

    step = predict(config, hardware, gpus)
    return {
        "gpu": hardware.name,
        "step_seconds": step.step_seconds,
        "tokens_per_second_per_gpu": step.tokens_per_second_per_gpu,
        "exposed": dict(step.exposed),
        "memory_bytes": ledger(config, make_grid(config, gpus), hardware).largest.held,
    }


def show(
    configs: Sequence[Config], layouts: Sequence[str], figures: Sequence[dict[str, Any]]
) -> None:
    """A line a layout, then what the fastest would take for the whole run, as the LLaMA paper says
    it (§2.4: tokens/s/GPU, the number of GPUs, days)."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    titles = ["layout", "step s", "tokens/s/GPU", "TFLOP/s/GPU", "MFU", "memory", "exposed, s"]
    if "predicted" in figures[0]:
        titles.insert(2, "predicted")
    for place, title in enumerate(titles):
        table.add_column(title, justify="right" if 0 < place < len(titles) - 1 else "left")
    for place, row in enumerate(figures):
        seconds = row["step_seconds"]["median"]
        table.add_row(
            (layouts[place] if layouts else "") or _axes(row["layout"]),
            f"{seconds:.3g}",
            *_predicted(row, seconds),
            f"{row['tokens_per_second_per_gpu']:,.0f}",
            f"{row['tflops_per_gpu']:.3g}",
            "–" if row["mfu"] is None else f"{row['mfu']:.1%}",
            f"{row['peak_memory_bytes'] / 2**30:.2f} GiB",
            _exposed(row["exposed_seconds"]),
        )
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH  # a file has no width: nothing is to be cut
    console.print(table)
    best = max(range(len(figures)), key=lambda place: figures[place]["tokens_per_second"])
    row, config = figures[best], configs[best]
    tokens = config.train.total_steps * row["tokens_per_step"]
    days = tokens / row["tokens_per_second"] / SECONDS_A_DAY
    gpus = row["tokens_per_second"] / row["tokens_per_second_per_gpu"]
    console.print(
        f"{row['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU on {gpus:.0f} × {row['device']}: "
        f"{tokens:.3g} tokens take {days:,.3g} days"
    )


def _predicted(row: dict[str, Any], seconds: float) -> Iterator[str]:
    """The column of the prediction, where there is one."""
    if "predicted" in row:
        said = row["predicted"]["step_seconds"]
        yield f"{said:.3g} ({said / seconds - 1:+.0%})"


def _axes(layout: dict[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in layout.items())


def _exposed(seconds: dict[str, float] | None) -> str:
    """The groups that are waited for, longest first; a pipeline's links as one."""
    if seconds is None:
        return "–"
    kinds: defaultdict[str, float] = defaultdict(float)
    for group, each in seconds.items():
        kinds[group.split()[0]] += each
    most_first = sorted(kinds.items(), key=lambda item: -item[1])
    return ", ".join(f"{group} {each:.2g}" for group, each in most_first) or "none"
