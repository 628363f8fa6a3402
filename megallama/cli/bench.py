"""Time training steps of a config, on its data or on synthetic tokens."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="local workers")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="steps before them")
    parser.add_argument("--json", type=Path, metavar="F", help="also write the figures here")
    parser.epilog = (
        "mfu counts 6·L·[(2+2K/H)·D²+3·D·F] + 6·V·D + 6·L·D·S FLOPs a token (causal attention "
        "half), mfu_6n counts 6·parameters; both are null where the device's peak is unknown."
    )


def run(args: argparse.Namespace) -> int:
    """Print the figures, and write them with --json."""
    import json

    from megallama.config.load import load_config
    from megallama.errors import EXIT_DONE, ConfigError
    from megallama.files import refuse_os_errors

    if args.steps < 1 or args.warmup < 0:
        raise ConfigError(f"--steps {args.steps} --warmup {args.warmup}: at least 1 and 0")
    from megallama.config.schema import Config
    from megallama.spec.grid import make_grid
    from megallama.train.launch import launch
    from megallama.train.process import Process
    from megallama.train.signals import StopSignals

    def prepare(processes: int) -> Config:
        config = load_config(args.config, args.overrides)
        make_grid(config, processes)
        return config

    def work(config: Config, process: Process, stop: StopSignals) -> int:
        from megallama.train.bench import bench

        figures = bench(config, args.steps, args.warmup, process)
        text = json.dumps(figures, indent=2)
        if process.rank == 0:
            print(text)
        if process.rank == 0 and args.json:
            with refuse_os_errors("write", args.json):
                args.json.write_text(text + "\n")
        return EXIT_DONE

    return launch(args.nproc, prepare, work)
