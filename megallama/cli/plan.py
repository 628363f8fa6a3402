"""Predict a run's memory and step time on a machine that need not be there."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megallama.cli.plan_figures import Planned
    from megallama.config.schema import Config
    from megallama.plan.hardware import Hardware
    from megallama.plan.search import Found

EPILOG = (
    "Every figure is predicted, none is measured. Memory: the bytes of tensors are exact, what the "
    "allocator loses (5% of what comes and goes) and what driver and libraries take is assumed. "
    "mfu counts 6·L·[(2+2K/H)·D²+3·D·F] + 6·V·D + 6·L·D·S FLOPs a token, mfu_6n counts "
    "6·parameters. A search varies parallel.{tensor, pipeline, data, schedule, virtual_stages, "
    "overlap} and train.{micro_batch, saved_activations}; those given on the command line keep "
    "their values. The exit code is 0 whether the run fits or not: the answer is in the output. "
    "Advice takes the scaling law L = E + A/N^α + B/D^β (arXiv 2203.15556; constants of arXiv "
    "2404.10102 or of the first), and counts 6·N·D FLOPs for training and 2·N·T for serving."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--gpus", required=True, type=int, metavar="N", help="devices of the job")
    parser.add_argument(
        "--gpu", required=True, metavar="NAME",
        help="a100-80gb, h100, h200 or cpu, or a YAML file of `megallama doctor --calibrate`",
    )  # fmt: skip
    parser.add_argument("--search", action="store_true", help="find the fastest layout that fits")
    parser.add_argument("--write", type=Path, metavar="F", help="write the planned config here")
    parser.add_argument(
        "--budget", type=_amount, metavar="TOKENS", help="tokens to train on (default: the run's)"
    )
    parser.add_argument(
        "--timeline", type=Path, metavar="F", help="the predicted step: F.json (Perfetto) or F.png"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures here")
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument(
        "--target-loss", type=_amount, metavar="L", help="advise a model size and tokens for a loss"
    )
    goal.add_argument(
        "--gpu-hours", type=_amount, metavar="H", help="the same for so many hours of such a GPU"
    )
    parser.add_argument(
        "--served", type=_amount, default=0.0, metavar="TOKENS",
        help="tokens that the advised model will read and write when it serves (default 0)",
    )  # fmt: skip
    parser.add_argument(
        "--law", choices=("besiroglu", "hoffmann"), default="besiroglu", metavar="NAME",
        help="constants of the scaling law: besiroglu (default) or hoffmann",
    )  # fmt: skip
    parser.epilog = EPILOG


def _amount(text: str) -> float:
    try:
        amount = float(text)
    except ValueError:
        amount = math.nan
    if not 0 < amount < 1e30:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number; give 1.4e12, say")
    return amount


def run(args: argparse.Namespace) -> int:
    """Print the plan; write the files that are asked for."""
    import json

    from rich.console import Console

    from megallama.cli import plan_text
    from megallama.cli.plan_figures import advise, figures, planned
    from megallama.config.load import config_to_yaml, load_config
    from megallama.errors import EXIT_DONE
    from megallama.files import write_atomic
    from megallama.plan.hardware import load_hardware

    _check(args)
    hardware = load_hardware(args.gpu)
    config = load_config(args.config, args.overrides)
    found = _search(args, config, hardware) if args.search else None
    plan = planned(found.best.layout.config if found else config, hardware, args.gpus, args.budget)
    goal = {"loss": args.target_loss, "gpu_hours": args.gpu_hours}
    advice = advise(plan, goal, args.served, args.law)
    if args.json is not None:
        content = json.dumps(figures(plan, found, advice), indent=1)
        write_atomic(args.json, content.encode() + b"\n")
    if args.write is not None:
        write_atomic(args.write, config_to_yaml(plan.config).encode())
    if args.timeline is not None:
        write_atomic(args.timeline, _timeline(plan, args.timeline.suffix))
    console = Console(highlight=False)
    if found:
        plan_text.show_search(console, found)
    plan_text.show(console, plan)
    plan_text.show_advice(console, advice)
    return EXIT_DONE


def _check(args: argparse.Namespace) -> None:
    """Raises ConfigError before anything is worked out."""
    from megallama.errors import ConfigError
    from megallama.files import refuse_overwriting

    if args.gpus < 1:
        raise ConfigError(f"--gpus {args.gpus}: give at least 1")
    if args.timeline is not None and args.timeline.suffix not in (".json", ".png"):
        raise ConfigError(f"--timeline {args.timeline}: name a .json or a .png file")
    if args.served and not (args.target_loss or args.gpu_hours):
        raise ConfigError(
            f"--served {args.served:g}: is for advice; give --target-loss or --gpu-hours too"
        )
    outputs = [path for path in (args.json, args.write, args.timeline) if path is not None]
    refuse_overwriting(outputs, [args.config])
    seen: set[Path] = set()
    for path in outputs:
        if path.resolve() in seen:
            raise ConfigError(f"{path}: is named for two outputs; name another")
        seen.add(path.resolve())


def _search(args: argparse.Namespace, config: Config, hardware: Hardware) -> Found:
    """Keys given on the command line keep their values."""
    from megallama.plan.search import search

    fixed = {text.partition("=")[0] for text in args.overrides}
    return search(config, hardware, args.gpus, fixed)


def _timeline(plan: Planned, suffix: str) -> bytes:
    from megallama.cli.plan_timeline import picture, timeline
    from megallama.train.trace import trace_of

    return picture(plan) if suffix == ".png" else trace_of(timeline(plan))
