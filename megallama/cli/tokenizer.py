"""Train a tokenizer: SentencePiece BPE with LLaMA's settings."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `tokenizer train`."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train a tokenizer on a text corpus")
    train.add_argument("--input", nargs="+", required=True, type=Path, metavar="FILE",
                       help=".txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet")  # fmt: skip
    train.add_argument("--vocab-size", required=True, type=int, metavar="N")
    train.add_argument("--out", required=True, type=Path, metavar="TOK.model")
    train.add_argument("--text-field", default="text", metavar="NAME", help="default: text")


def run(args: argparse.Namespace) -> int:
    """Trains the tokenizer and says what it became. Raises UserError."""
    from megallama.data.tokenizer import train_tokenizer
    from megallama.files import refuse_overwriting

    refuse_overwriting([args.out], args.input)
    tokenizer = train_tokenizer(args.input, args.vocab_size, args.out, args.text_field)
    print(f"{args.out}: {tokenizer.vocab_size:,} tokens, hash {tokenizer.hash}")
    return 0
