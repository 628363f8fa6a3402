"""Train a model from a config."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="local workers")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|none|PATH",
        help="newest checkpoint of the run (default), none, or that of a run or checkpoint PATH",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, show the first batch, and stop"
    )


def run(args: argparse.Namespace) -> int:
    """Train; exit codes: 0 done, 75 or 130 stopped after saving."""
    from megallama.config.load import load_config
    from megallama.config.schema import Config
    from megallama.spec.grid import make_grid
    from megallama.train.launch import launch
    from megallama.train.process import Process
    from megallama.train.signals import StopSignals

    def prepare(processes: int) -> Config:
        config = load_config(args.config, args.overrides)
        make_grid(config, processes)
        return config

    if args.dry_run:
        config = prepare(args.nproc)
        from megallama.train.dry_run import dry_run

        return dry_run(config, args.nproc)

    def work(config: Config, process: Process, stop: StopSignals) -> int:
        from megallama.train.job import train

        return train(config, args.resume, stop, process)

    return launch(args.nproc, prepare, work)
