"""Draw a pipeline schedule, with its bubble and what its ranks hold."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

#: Bounds of a time that is not 0: sums and ratios of such times are finite numbers.
SHORTEST, LONGEST = 1e-9, 1e9
#: Most passes of all ranks together: about as many as a minute simulates.
MOST_PASSES = 3_000_000

EPILOG = (
    "Times are those of a rank's whole share of a micro-batch; its chunks divide them. Bubble "
    "fraction: 1 - a rank's work / the longest rank span, from a rank's own first pass to its own "
    "last, without the cost of communication (arXiv 2401.10241). Makespan: from the first pass of "
    "all to the last. ZB-H2 and ZB-V have no bubble on any rank, but their ranks begin and end one "
    "after the other. That costs nothing only if a rank begins its next step at once, with an "
    "optimizer step that waits for nobody (post-validation); without it every step takes the "
    "makespan. In the JSON a fused action is two objects with fused: true, forward and backward, "
    "each with its share of the action's time; what both make is there when the second ends."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from megallama.spec.schedules.build import NAMES

    parser.add_argument("--name", required=True, choices=NAMES, metavar="NAME",
                        help=", ".join(NAMES))  # fmt: skip
    parser.add_argument("--stages", required=True, type=int, metavar="P", help="pipeline ranks")
    parser.add_argument(
        "--microbatches", required=True, type=int, metavar="M", help="of a step, per pipeline"
    )
    parser.add_argument(
        "--virtual-stages", type=int, metavar="V",
        help="chunks a rank (default: 2 for interleaved, interleaved-fused and zb-v, else 1)",
    )  # fmt: skip
    for name, what in {
        "forward": "of a forward",
        "backward": "of a backward for the activations",
        "weight": "of a backward for the weights",
    }.items():
        parser.add_argument(
            f"--{name}", type=_time, default=1.0, metavar="T", help=f"time {what} (default 1)"
        )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures here")
    parser.add_argument("--png", type=Path, metavar="F", help="also draw a picture here")
    parser.epilog = EPILOG


def _time(text: str) -> float:
    try:
        time = float(text)
    except ValueError:
        time = math.nan
    if time != 0 and not SHORTEST <= time <= LONGEST:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a time; give 0, or {SHORTEST:g} to {LONGEST:g}"
        )
    return time


def run(args: argparse.Namespace) -> int:
    """Print the timeline and its figures; write them with --json, draw them with --png."""
    import json

    from rich.console import Console

    from megallama.cli.schedule_text import show
    from megallama.config.schedules import default_virtual_stages
    from megallama.errors import EXIT_DONE, ConfigError
    from megallama.files import write_atomic
    from megallama.spec.schedules.build import make_schedule
    from megallama.spec.schedules.simulate import simulate

    times = (args.forward, args.backward, args.weight)
    if not any(times):
        raise ConfigError("--forward 0 --backward 0 --weight 0: one at least takes some time")
    if args.json is not None and args.png is not None and args.json.resolve() == args.png.resolve():
        raise ConfigError(f"--json and --png {args.png}: are one file; name two")
    chunks = args.virtual_stages
    if chunks is None:
        chunks = default_virtual_stages(args.name)
    passes = 3 * args.stages * chunks * args.microbatches
    if passes > MOST_PASSES:
        raise ConfigError(
            f"--stages {args.stages} --microbatches {args.microbatches}: are {passes:,} passes to "
            f"draw; ask for {MOST_PASSES:,} at most"
        )
    schedule = make_schedule(args.name, args.stages, args.microbatches, chunks)
    simulation = simulate(schedule, *times)
    if args.json is not None:
        from megallama.cli.schedule_json import figures

        write_atomic(args.json, json.dumps(figures(simulation, times), indent=1).encode() + b"\n")
    if args.png is not None:
        from megallama.cli.schedule_picture import draw

        write_atomic(args.png, draw(simulation, times))
    show(simulation, times, Console(highlight=False))
    return EXIT_DONE
