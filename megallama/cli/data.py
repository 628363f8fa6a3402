"""Build token files from text, inspect them, or make a corpus of Python's own sources."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `data build`, `data inspect` and `data stdlib`."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="text → PREFIX.bin, PREFIX.idx, PREFIX.json")
    build.add_argument("--input", nargs="+", required=True, type=Path, metavar="FILE",
                       help=".txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet")  # fmt: skip
    build.add_argument("--tokenizer", required=True, type=Path, metavar="TOK.model")
    build.add_argument("--out", required=True, type=Path, metavar="PREFIX")
    build.add_argument("--text-field", default="text", metavar="NAME", help="default: text")
    build.add_argument("--workers", type=int, metavar="N", help="processes; default: one a core")
    build.add_argument("--json", type=Path, metavar="PATH", help="also write the counts here")

    inspect = commands.add_parser("inspect", help="verify a token file; show a document")
    inspect.add_argument("prefix", type=Path, metavar="PREFIX")
    inspect.add_argument("--document", type=int, metavar="N", help="show document N")
    inspect.add_argument("--tokenizer", type=Path, metavar="TOK.model", help="show it as text")
    inspect.add_argument("--json", type=Path, metavar="PATH", help="also write the counts here")

    stdlib = commands.add_parser("stdlib", help="a corpus: Python's standard library")
    stdlib.add_argument("--out", required=True, type=Path, metavar="FILE.jsonl")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand. Raises UserError."""
    actions = {"build": _build, "inspect": _inspect, "stdlib": _stdlib}
    return actions[args.action](args)


def _build(args: argparse.Namespace) -> int:
    import time

    from megallama.data.build import build
    from megallama.data.documents import check_inputs
    from megallama.data.token_files import with_suffix
    from megallama.files import refuse_overwriting

    reads = [*args.input, args.tokenizer]
    writes = [with_suffix(args.out, suffix) for suffix in (".bin", ".idx", ".json")]
    refuse_overwriting(writes, reads)
    if args.json is not None:
        refuse_overwriting([args.json], reads + writes)
    began = time.monotonic()
    with _progress_bar(check_inputs(args.input)) as progress:
        report = build(
            args.input, args.tokenizer, args.out, args.text_field, args.workers, progress
        )
    seconds = time.monotonic() - began
    side = report.sidecar
    notes = [f"{side.tokens / seconds:,.0f} tokens/s"]
    if report.cut_files:
        notes.append(f"{report.cut_files} .txt over 8 MiB cut at line ends into documents of 1 MiB")
    if report.empty_documents:
        notes.append(f"{report.empty_documents:,} empty documents skipped")
    if side.documents_with_u2581:
        notes.append(f"{side.documents_with_u2581:,} documents had U+2581, which became spaces")
    print(f"{args.out}: {side.tokens:,} tokens, {side.documents:,} documents, {side.dtype}, "
          f"unigram entropy {side.unigram_entropy_nats:.4f} nats; {'; '.join(notes)}")  # fmt: skip
    counts = {"prefix": str(args.out), **_counts(asdict(side)), "seconds": seconds}
    counts |= {"empty_documents": report.empty_documents, "cut_files": report.cut_files}
    _write_json(args.json, counts)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from megallama.data.token_files import TokenFile, require_document, with_suffix
    from megallama.data.tokenizer import Tokenizer
    from megallama.data.verify import check_tokenizer, verify
    from megallama.files import refuse_overwriting

    file = TokenFile(args.prefix)
    if args.json is not None:
        refuse_overwriting(
            [args.json], [with_suffix(args.prefix, suffix) for suffix in (".bin", ".idx", ".json")]
        )
    tokenizer = None if args.tokenizer is None else Tokenizer(args.tokenizer)
    if tokenizer is not None:
        check_tokenizer(file, tokenizer)
    if args.document is not None:
        require_document(file, args.document)
    verify(file, None if tokenizer is None else tokenizer.vocab_size)

    counts: dict[str, object] = {"prefix": file.prefix, "tokens": file.tokens}
    counts |= {"documents": file.documents, "dtype": file.index.dtype.name}
    if file.sidecar is not None:
        counts |= _counts(asdict(file.sidecar))
    for name, value in counts.items():
        print(f"{name:22} {value:,}" if isinstance(value, int) else f"{name:22} {value}")
    checked = ["hashes"] if file.sidecar is not None else []
    checked += ["index"] + (["token ids"] if file.sidecar is not None or tokenizer else [])
    unknown = "" if file.sidecar is not None else " (no sidecar: hashes and tokenizer unknown)"
    print(f"{'verified':22} {', '.join(checked)}{unknown}")
    if args.document is not None:
        ids = file.document(args.document).tolist()
        print(f"\ndocument {args.document}, {len(ids):,} tokens")
        print(tokenizer.decode(ids) if tokenizer is not None else ids)
    _write_json(args.json, counts)
    return 0


def _stdlib(args: argparse.Namespace) -> int:
    from megallama.data.stdlib_corpus import write_stdlib_corpus

    files, characters = write_stdlib_corpus(args.out)
    print(f"{args.out}: {files:,} files, {characters:,} characters")
    return 0


def _counts(sidecar: dict[str, object]) -> dict[str, object]:
    """The sidecar without its lists of hashes."""
    return {name: value for name, value in sidecar.items() if not isinstance(value, list)}


def _write_json(path: Path | None, counts: dict[str, object]) -> None:
    from megallama.files import atomic_write

    if path is not None:
        with atomic_write(path) as file:
            file.write(json.dumps(counts, indent=1).encode() + b"\n")


@contextmanager
def _progress_bar(total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that moves the bar by some bytes; without a terminal there is no bar."""
    if not sys.stderr.isatty():
        yield lambda consumed: None
        return
    from rich import progress
    from rich.console import Console

    columns = (progress.TextColumn("tokenizing"), progress.BarColumn(), progress.DownloadColumn(),
               progress.TransferSpeedColumn(), progress.TimeRemainingColumn())  # fmt: skip
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tokenizing", total=total)
        yield lambda consumed: bar.advance(task, consumed)
