"""Check a job's collectives without GPUs."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="ranks of the job")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write what was found here")
    parser.epilog = (
        "Runs the training step of a rank of each kind on tensors without values, and matches what "
        "all ranks ask of their groups. Exit code 0: every operation has its counterparts and no "
        "rank waits for ever; 1: some do not, and the first is named."
    )


def run(args: argparse.Namespace) -> int:
    """Check; exit code 1 where the job would hang or mix up data."""
    from megallama.config.load import load_config
    from megallama.errors import EXIT_DONE, EXIT_FAILED, ConfigError
    from megallama.files import refuse_overwriting, write_atomic
    from megallama.spec.grid import make_grid

    if args.gpus < 1:
        raise ConfigError(f"--gpus {args.gpus}: at least 1 is needed")
    if args.json:
        refuse_overwriting([args.json], [args.config])
    config = load_config(args.config, args.overrides)
    grid = make_grid(config, args.gpus)
    from megallama.check.job import check
    from megallama.check.report import as_json, lines

    checked = check(config, grid)
    print("\n".join(lines(config, grid, checked)))
    if args.json:
        write_atomic(args.json, as_json(config, grid, checked).encode() + b"\n")
    return EXIT_DONE if checked.fault is None else EXIT_FAILED
