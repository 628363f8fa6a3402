"""Say what this machine can do, and what to mend."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # takes none


def run(args: argparse.Namespace) -> int:
    """Print one line a finding."""
    from megallama.errors import EXIT_DONE
    from megallama.train.doctor import findings

    for line in findings():
        print(line)
    return EXIT_DONE
