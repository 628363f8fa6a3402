"""Convert checkpoints to and from Hugging Face's and Meta's formats, in bounded memory."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megallama.checkpoint.store import Checkpoint
    from megallama.checkpoint.weights import Weights
    from megallama.data.tokenizer import Tokenizer

TOKENIZER = "tokenizer.model"
TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"
SLACK = 1 << 24  # bytes of room for a file's header and what stands beside the weights
#: What stands beside the weights and goes along unchanged.
COMPANIONS = (
    TOKENIZER,
    TOKENIZER_JSON,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    GENERATION,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `convert from-hf`, `to-hf`, `from-meta` and `to-meta`."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="COMMAND")
    for name, other in {"hf": "HF_DIR", "meta": "META_DIR"}.items():
        long = {"hf": "Hugging Face's format", "meta": "Meta's format"}[name]
        into = commands.add_parser(f"from-{name}", help=f"{long} → a checkpoint")
        into.add_argument("source", type=Path, metavar=other)
        into.add_argument("target", type=Path, metavar="CHECKPOINT")
        out = commands.add_parser(f"to-{name}", help=f"a checkpoint → {long}")
        out.add_argument("source", type=Path, metavar="CHECKPOINT",
                         help="a checkpoint or a run directory")  # fmt: skip
        out.add_argument("target", type=Path, metavar=other)
        out.add_argument("--dtype", choices=("bf16", "fp16", "fp32", "fp64"),
                         help="of the weights; default: train.precision of the checkpoint's "
                         "config")  # fmt: skip
        if name == "meta":
            out.add_argument("--shards", type=int, default=1, metavar="N",
                             help="files, one a model-parallel rank; default: 1")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Converts and says what was written. Raises UserError."""
    from megallama.errors import EXIT_DONE, ConfigError

    direction, _, kind = args.action.partition("-")
    if getattr(args, "shards", 1) < 1:
        raise ConfigError(f"--shards {args.shards}: write at least 1 file")
    _expect(kind if direction == "from" else "megallama", args.source, args.action)
    if direction == "from":
        _to_checkpoint(kind, args.source, args.target)
    else:
        _from_checkpoint(kind, args.source, args.target, args.dtype, getattr(args, "shards", 1))
    return EXIT_DONE


def _expect(wanted: str, source: Path, action: str) -> None:
    """Refuse a source of another kind than the command converts, by the files that it has."""
    from megallama.errors import ConfigError

    if not source.is_dir():
        raise ConfigError(f"{source}: no such directory; check the path")
    kinds = {
        "megallama": ("a checkpoint", ("manifest.json", "checkpoints"), "to-hf or to-meta"),
        "meta": ("in Meta's format", ("params.json", "consolidated.00.pth"), "from-meta"),
        "hf": ("in Hugging Face's format", ("config.json",), "from-hf"),
    }
    found = [k for k, (_, files, _) in kinds.items() if any((source / f).exists() for f in files)]
    if wanted in found:
        return
    if found:
        words, _, command = kinds[found[0]]
        raise ConfigError(f"{source}: is {words}, not for {action}; use convert {command}")
    raise ConfigError(
        f"{source}: not {kinds[wanted][0]} (no {kinds[wanted][1][0]}); check the path"
    )


def _to_checkpoint(kind: str, source: Path, target: Path) -> None:
    from dataclasses import asdict

    from megallama.checkpoint.huggingface import HuggingFaceWeights
    from megallama.checkpoint.manifest import Manifest
    from megallama.checkpoint.meta import MetaWeights
    from megallama.checkpoint.tensor_files import foreign_file
    from megallama.checkpoint.weights import weight_bytes, write_checkpoint
    from megallama.checkpoint.whole import whole_directory
    from megallama.train.snapshot import Progress

    weights: Weights = HuggingFaceWeights(source) if kind == "hf" else MetaWeights(source)
    config = weights.config.model_dump(mode="json")
    tokenizer = _sentencepiece(foreign_file(source, TOKENIZER))
    if tokenizer:
        config["data"]["tokenizer"] = str((target / TOKENIZER).absolute())
    else:
        _say(f"{source}: no SentencePiece {TOKENIZER}, so `generate` cannot read a prompt")
    facts = Manifest(asdict(Progress()), config, tokenizer.hash if tokenizer else None, {})
    room = weight_bytes(weights.config.model, weights.config.train.precision) + SLACK
    with whole_directory(target, room) as partial:
        write_checkpoint(partial, weights, facts)
        _copy_companions(source, partial, COMPANIONS, links=True)
    _report(target, weights, weights.config.train.precision)


def _from_checkpoint(kind: str, source: Path, target: Path, dtype: str | None, shards: int) -> None:
    from megallama.checkpoint.huggingface import write_huggingface
    from megallama.checkpoint.meta import write_meta
    from megallama.checkpoint.weights import CheckpointWeights, weight_bytes
    from megallama.checkpoint.whole import whole_directory
    from megallama.train.snapshot import find_checkpoint

    checkpoint = find_checkpoint(source)
    weights = CheckpointWeights(checkpoint)
    precision = dtype or weights.config.train.precision
    tokenizer = _tokenizer_of(checkpoint, weights)
    written = weights.config.model
    if kind == "meta":  # which has both ends of a tied embedding
        written = written.model_copy(update={"tie_embeddings": False})
    with whole_directory(target, weight_bytes(written, precision) + SLACK * shards) as partial:
        if kind == "hf":
            _copy_companions(checkpoint.directory, partial, COMPANIONS)
            ids = _token_ids(checkpoint, tokenizer)
            write_huggingface(partial, weights, precision, ids)
        else:
            _copy_companions(checkpoint.directory, partial, (TOKENIZER,))
            # Llama 3's code divides the embedding by rows; its tokenizer is no SentencePiece model.
            by_rows = (partial / TOKENIZER).exists() and tokenizer is None
            write_meta(partial, weights, precision, shards, 0 if by_rows else 1)
        if tokenizer:
            _write_tokenizer(partial, tokenizer, kind)
    scaling = weights.config.model.rope_scaling
    if kind == "meta" and scaling and scaling.factor != 8:
        _say(
            f"{target}: params.json has rope_scaling_factor={scaling.factor:g}, which Meta's code "
            "for Llama 3 does not read: it takes 8"
        )
    _report(target, weights, precision)


def _sentencepiece(path: Path) -> Tokenizer | None:
    """The tokenizer at `path`, where there is one of the kind that megallama reads."""
    from megallama.data.tokenizer import Tokenizer
    from megallama.errors import CorruptError

    try:
        return Tokenizer(path) if path.exists() else None
    except CorruptError:
        return None  # Llama 3's is a list of byte pairs


def _tokenizer_of(checkpoint: Checkpoint, weights: Weights) -> Tokenizer | None:
    """The tokenizer that a checkpoint was trained with: beside it, or where its config says."""
    named, expected = weights.config.data.tokenizer, checkpoint.manifest.tokenizer_hash
    if expected is None:
        return None
    for path in (checkpoint.directory / TOKENIZER, named):
        tokenizer = _sentencepiece(path) if path else None
        if tokenizer and tokenizer.hash == expected:
            return tokenizer
    _say(
        f"{named}: no longer the tokenizer of {checkpoint.directory}; copy it to the target by hand"
    )
    return None


def _token_ids(
    checkpoint: Checkpoint, tokenizer: Tokenizer | None
) -> dict[str, int | list[int] | None]:
    from megallama.checkpoint.tensor_files import read_json

    if tokenizer:
        return {"bos": tokenizer.bos, "eos": tokenizer.eos}
    path = checkpoint.directory / GENERATION
    given = read_json(path) if path.exists() else {}
    return {token: given.get(f"{token}_token_id") for token in ("bos", "eos", "pad")}


def _write_tokenizer(directory: Path, tokenizer: Tokenizer, kind: str) -> None:
    """Write `tokenizer.model`, and for transformers what makes it give the same ids."""
    import json
    import shutil

    from megallama.data.huggingface_tokenizer import tokenizer_config, tokenizer_json
    from megallama.files import refuse_os_errors, write_atomic

    path = directory / TOKENIZER
    with refuse_os_errors("copy", tokenizer.path):
        if not path.exists():
            shutil.copyfile(tokenizer.path, path)
    names = (TOKENIZER_JSON, TOKENIZER_CONFIG)
    if kind == "hf" and not any((directory / name).exists() for name in names):
        body = tokenizer_json(path)
        if body:
            write_atomic(directory / TOKENIZER_JSON, json.dumps(body, indent=1).encode())
        write_atomic(
            directory / TOKENIZER_CONFIG,
            json.dumps(tokenizer_config(path, exact=bool(body)), indent=2).encode(),
        )


def _copy_companions(
    source: Path, target: Path, names: tuple[str, ...], links: bool = False
) -> None:
    """Copy what is there; `links` are followed where they may be, or refused."""
    import shutil

    from megallama.checkpoint.tensor_files import foreign_file
    from megallama.errors import ConfigError
    from megallama.files import plain_file, refuse_os_errors

    for name in names:
        path = source / name
        if path.is_symlink() and not links:
            raise ConfigError(f"{path}: is a link, and may lead anywhere; put a file there")
        if foreign_file(source, name).is_file():
            write = refuse_os_errors("write", target / name)
            with plain_file(path) as file, write, open(target / name, "xb") as copy:
                shutil.copyfileobj(file, copy)


def _report(target: Path, weights: Weights, precision: str) -> None:
    from megallama.spec.parameters import parameter_table

    count = sum(parameter.numel for parameter in parameter_table(weights.config.model))
    print(f"{target}: {count:,} parameters in {precision}")


def _say(line: str) -> None:
    print(f"megallama: {line}", file=sys.stderr)
