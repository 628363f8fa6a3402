"""The `megallama` command: finds the subcommand, and turns a UserError into one line."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, TextIO

from megallama import __version__
from megallama.errors import EXIT_DONE, EXIT_INTERRUPTED, ConfigError, UserError

#: Subcommand → what `megallama --help` says of it.
COMMANDS = {
    "train": "train a model from a config",
    "bench": "time training steps of a config",
    "plan": "predict a run's memory and time; find its layout",
    "check": "run a job's step without GPUs and match its collectives",
    "launch": "make a SLURM job of a run",
    "generate": "continue a prompt with a checkpoint",
    "report": "draw a run's curves: one picture and one page",
    "convert": "to and from Hugging Face's and Meta's formats",
    "checkpoint": "list, verify and compare checkpoints",
    "schedule": "draw a pipeline schedule",
    "tokenizer": "train a tokenizer",
    "data": "build and inspect token files",
    "doctor": "say what this machine can do",
}


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are errors like any other: one line, exit code 78."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    words = ""
    try:
        args = _parse(list(sys.argv[1:] if arguments is None else arguments))
        code: int = args.run(args)
    except UserError as error:
        code, words = error.exit_code, f"megallama: error: {error}\n"
    except KeyboardInterrupt:
        code, words = EXIT_INTERRUPTED, "megallama: interrupted\n"
    except BrokenPipeError:  # whoever read our output has enough, `head` for one
        code = EXIT_DONE
    _write_out(sys.stdout)
    _write_out(sys.stderr, words)
    return code


def _write_out(stream: TextIO, words: str = "") -> None:
    """Write `words` after what is still in the buffer.

    Where a pipe was closed or a terminal is gone (EIO), nobody reads, and the exit code says all.
    """
    try:
        stream.write(words)
        stream.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        # The interpreter writes the buffer once more as it exits, and would exit with 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _parse(words: list[str]) -> argparse.Namespace:
    parser = Parser(prog="megallama", description="Pretrains LLaMA models.")
    parser.add_argument("--version", action="version", version=f"megallama {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if words and words[0] == name:  # the others are listed, not imported
            module = importlib.import_module(f"megallama.cli.{name}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    args, rest = parser.parse_known_args(words)
    if rest and ("overrides" not in args or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse ends CONFIG's overrides at the first option; they may go on after it
        args.overrides += rest
    return args
