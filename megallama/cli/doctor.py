"""Say what this machine can do, and what to mend."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="run.root, whose disk is looked at (default: runs)",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the findings here")
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE.yaml",
        help="measure this machine for `megallama plan --gpu FILE.yaml`, with --nproc ranks",
    )
    parser.add_argument(
        "--nproc", type=int, default=2, metavar="N", help="ranks that measure at once (2 or more)"
    )


def run(args: argparse.Namespace) -> int:
    """Print one line a finding; exit codes: 0, or 78 where training cannot work.

    With --calibrate, write the machine's constants instead.
    """
    if args.calibrate:
        from megallama.cli.calibrate import calibrate_to
        from megallama.errors import ConfigError

        for option, value in (("--root", args.root), ("--json", args.json)):
            if value:
                raise ConfigError(
                    f"{option} {value}: is of the findings; leave it or --calibrate out"
                )
        return calibrate_to(args.calibrate, args.nproc)
    import json
    from dataclasses import asdict

    from megallama import __version__
    from megallama.errors import EXIT_CONFIG, EXIT_DONE
    from megallama.files import write_atomic
    from megallama.train.finding import Finding, packages

    found = [Finding("megallama", __version__)]

    def show(finding: Finding) -> None:
        found.append(finding)
        print(finding, flush=True)

    print(found[0])
    for finding in packages():
        show(finding)
    if not any(finding.level == "broken" for finding in found):  # else there is nothing to import
        from megallama.train.doctor import findings

        for finding in findings(args.root or Path("runs")):
            show(finding)
    broken = sum(finding.level == "broken" for finding in found)
    notes = sum(finding.level == "note" for finding in found)
    print(f"{broken} broken, {notes} to mind" if broken or notes else "all is well")
    if args.json:
        report = {"working": not broken, "findings": [asdict(finding) for finding in found]}
        write_atomic(args.json, json.dumps(report, indent=1).encode() + b"\n")
    return EXIT_CONFIG if broken else EXIT_DONE
