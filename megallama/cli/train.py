"""Train a model from a config."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megallama.config.schema import Config
    from megallama.train.process import Process
    from megallama.train.signals import StopSignals


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
        "--allow",
        default="",
        metavar="KEY[,KEY]",
        help="keys that may have other values than the checkpoint was trained with",
    )
    parser.add_argument(
        "--init-from",
        metavar="PATH",
        help="begin a new run with the weights alone of a checkpoint, or of a run's newest",
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="start local workers again when one is lost, up to N times without a new checkpoint",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, show the first batch, and stop"
    )


def run(args: argparse.Namespace) -> int:
    """Train; exit codes: 0 done, 75 or 130 stopped after saving."""
    from megallama.config.changes import parse_allowed
    from megallama.config.load import load_config
    from megallama.spec.grid import make_grid
    from megallama.train.launch import launch

    allowed = parse_allowed(args.allow)
    overrides = list(args.overrides)
    if args.init_from:
        overrides.append(f"run.init_from={json.dumps(args.init_from)}")

    def prepare(processes: int) -> Config:
        config = load_config(args.config, overrides)
        make_grid(config, processes)
        return config

    if args.dry_run:
        config = prepare(args.nproc)
        from megallama.train.dry_run import dry_run

        return dry_run(config, args.nproc)

    def work(config: Config, resume: str, process: Process, stop: StopSignals) -> int:
        from megallama.train.job import train

        return train(config, resume, stop, process, allowed)

    if args.restarts:
        return _with_restarts(args, prepare, work)
    return launch(args.nproc, prepare, lambda config, *rest: work(config, args.resume, *rest))


def _with_restarts(
    args: argparse.Namespace,
    prepare: Callable[[int], Config],
    work: Callable[[Config, str, Process, StopSignals], int],
) -> int:
    """As `launch`, in local workers that are started again."""
    import os
    from functools import partial

    from megallama.errors import ConfigError
    from megallama.train.process import find_place
    from megallama.train.restarts import Restarts
    from megallama.train.supervisor import supervise

    if find_place(os.environ):
        raise ConfigError(f"--restarts {args.restarts}: leave it out; the launcher restarts a job")
    if args.nproc < 1:
        raise ConfigError(f"--nproc {args.nproc}: at least 1 process is needed")
    config = prepare(args.nproc)
    restarts = Restarts(
        args.restarts,
        config.run.directory,
        lambda resume: partial(work, config, resume),
        args.resume,
    )
    silence = config.parallel.timeout_seconds
    return supervise(args.nproc, restarts.first(), restarts.again, silence)
