"""Continue a prompt with a checkpoint's weights, taking the likeliest token each time."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint or a run directory"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="at most (default 64)")


def run(args: argparse.Namespace) -> int:
    """Print the prompt and its continuation."""
    from megallama.errors import EXIT_DONE, ConfigError
    from megallama.train.generate import generate

    if args.tokens < 1:
        raise ConfigError(f"--tokens {args.tokens}: ask for at least 1")
    print(generate(args.checkpoint, args.prompt, args.tokens))
    return EXIT_DONE
