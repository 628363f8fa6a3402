"""List a run's checkpoints, verify one, compare two."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megallama.checkpoint.store import Checkpoint

EXIT_DIFFERENT = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `checkpoint ls`, `verify` and `diff`."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="COMMAND")
    ls = commands.add_parser("ls", help="the finished checkpoints of a run")
    ls.add_argument("path", type=Path, metavar="RUN_DIR", help="or a checkpoint")
    verify = commands.add_parser("verify", help="hold every slice against its hash")
    verify.add_argument("path", type=Path, metavar="CHECKPOINT", help="or a run: its newest")
    diff = commands.add_parser(
        "diff",
        help="compare two bit for bit, whatever their layouts; exit code 1 where they differ",
    )
    diff.add_argument("paths", nargs=2, type=Path, metavar="CHECKPOINT")
    diff.add_argument("--weights-only", action="store_true",
                      help="not the moments and the counters")  # fmt: skip
    for command in (ls, verify, diff):
        command.add_argument("--json", type=Path, metavar="PATH", help="also write it here")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand. Raises UserError."""
    actions = {"ls": _ls, "verify": _verify, "diff": _diff}
    return actions[args.action](args)


def _ls(args: argparse.Namespace) -> int:
    from megallama.checkpoint.manifest import MANIFEST
    from megallama.checkpoint.store import Checkpoint, committed_checkpoints
    from megallama.errors import EXIT_DONE, ConfigError, CorruptError

    single = (args.path / MANIFEST).exists()
    folder = args.path / "checkpoints"
    if not single and not folder.is_dir():
        raise ConfigError(f"{args.path}: neither a run nor a checkpoint; check the path")
    found = [args.path] if single else committed_checkpoints(folder)
    rows = []
    for path in found:
        try:
            rows.append(_summary(Checkpoint(path)))
        except CorruptError as error:
            print(error)
            continue
        print("{path}  step {step}  {written}  {bytes:,} bytes  {parameters:,} parameters  "
              "{tensors} tensors: {kinds}".format(**rows[-1]))  # fmt: skip
    if not found:
        print(f"{args.path}: no finished checkpoint")
    _write_json(args.json, rows)
    return EXIT_DONE


def _summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint holds, by its manifest alone."""
    from datetime import datetime
    from math import prod

    from megallama.checkpoint.manifest import MANIFEST
    from megallama.checkpoint.weights import checkpoint_config, part_shapes

    manifest = checkpoint.manifest
    written = (checkpoint.directory / MANIFEST).stat().st_mtime
    shapes = part_shapes(checkpoint_config(checkpoint).model)
    return {
        "path": str(checkpoint.directory),
        "step": manifest.state.get("step"),
        "written": datetime.fromtimestamp(written).astimezone().isoformat(" ", "seconds"),
        "bytes": sum(file.bytes - file.header_bytes for file in manifest.files),
        "parameters": sum(prod(shape) for shape in shapes.values()),
        "tensors": len(manifest.tensors),
        "kinds": " ".join(sorted({name.partition("/")[0] for name in manifest.tensors})),
    }


def _verify(args: argparse.Namespace) -> int:
    from megallama.errors import EXIT_DONE
    from megallama.train.snapshot import find_checkpoint

    checkpoint = find_checkpoint(args.path)
    checkpoint.verify()
    row = _summary(checkpoint)
    print("{path}: intact, {bytes:,} bytes in {tensors} tensors".format(**row))
    _write_json(args.json, row)
    return EXIT_DONE


def _diff(args: argparse.Namespace) -> int:
    from megallama.checkpoint.compare import compare
    from megallama.errors import EXIT_DONE
    from megallama.train.snapshot import find_checkpoint

    old, new = (find_checkpoint(path) for path in args.paths)
    difference = compare(old, new, args.weights_only)
    for line in difference.lines():
        print(line)
    _write_json(args.json, difference.figures())
    return EXIT_DONE if difference.equal else EXIT_DIFFERENT


def _write_json(path: Path | None, content: object) -> None:
    import json

    from megallama.files import write_atomic

    if path is not None:
        write_atomic(path, json.dumps(content, indent=1).encode() + b"\n")
