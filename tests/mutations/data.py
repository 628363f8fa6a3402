"""Damage to what a run is fed with: token file, index, sidecar, tokenizer. The run is refused.

There is no older version of the data to fall back to, and no step may be taken with other tokens
than those that the run's checkpoint was trained on.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from megallama.config.schema import Config
from megallama.data.build import build
from megallama.data.tokenizer import train_tokenizer
from megallama.errors import UserError
from megallama.train.build import build_dataset
from tests.mutations.checkpoint import Victim
from tests.mutations.damage import FAULTS, Others, Region, replaced

FILES = ("corpus.bin", "corpus.idx", "corpus.json", "tokenizer.model")
SIDECAR = "corpus.json"
SIDECAR_KEYS = (
    "tokenizer_hash", "vocab_size", "tokens", "documents", "dtype", "unigram_entropy_nats",
    "documents_with_u2581", "xxh3_bin", "xxh3_idx", "xxh3_self",
)  # fmt: skip


class Data:
    """The files of a run, with an older version of each, and one of the same kind beside it.

    `folder` holds what `tests.chaos.pairs.make_data` makes.
    """

    def __init__(self, folder: Path, victim: Victim) -> None:
        self.folder, self.victim = folder, victim
        self.others = {name: Others(b"", b"") for name in FILES}
        for number, name in enumerate(("older", "sibling")):
            other = folder / name
            other.mkdir()
            lines = (folder / "corpus.jsonl").read_text().splitlines(keepends=True)
            kept = lines[:-1] if name == "older" else lines[::-1]  # the same size, another order
            (other / "corpus.jsonl").write_text("".join(kept))
            vocab = victim.config.model.vocab - 1 - number
            train_tokenizer([other / "corpus.jsonl"], vocab, other / "tokenizer.model")
            build([other / "corpus.jsonl"], folder / "tokenizer.model", other / "corpus", "text", 1)
            for file in FILES:
                raw = (other / file).read_bytes()
                self.others[file] = self.others[file]._replace(**{name: raw})
            shutil.rmtree(other)


def regions(name: str, raw: bytes) -> dict[str, Region]:
    """The parts of a file."""
    if name == SIDECAR:
        places = [0, *(raw.index(f'\n "{key}": '.encode()) for key in SIDECAR_KEYS), len(raw)]
        parts = ("format", *SIDECAR_KEYS)
    elif name.endswith(".idx"):
        sequences = int.from_bytes(raw[18:26], "little")
        lengths, offsets, documents = 34, 34 + 4 * sequences, 34 + 12 * sequences
        places = [0, 9, 17, 18, lengths, offsets, documents, len(raw)]
        parts = ("magic", "version", "dtype", "counts", "lengths", "offsets", "documents")
    else:
        places = [len(raw) * third // 3 for third in range(4)]
        parts = ("first", "middle", "last")
    return {part: Region(*pair) for part, pair in zip(parts, pairwise(places), strict=True)}


def mutations(data: Data) -> Iterator[tuple[str, str, str]]:
    """Every file × region × fault, by their names."""
    for name in FILES:
        for region in regions(name, (data.folder / name).read_bytes()):
            for fault in FAULTS:
                yield name, region, fault


def accepted(data: Data, mutation: tuple[str, str, str], generator: random.Random) -> str | None:
    """Damage a file, start and resume the run, and mend it. What is wrong with the answer, or
    nothing; None where the fault changed no byte."""
    name, region, fault = mutation
    path = data.folder / name
    whole = path.read_bytes()
    damaged = FAULTS[fault](whole, regions(name, whole)[region], data.others[name], generator)
    if damaged == whole:
        return None
    with replaced(path, damaged):
        return _judged(data.victim, path, gone=damaged is None)


def _judged(victim: Victim, path: Path, gone: bool) -> str:
    try:
        dataset = build_dataset(victim.config)
    except UserError as error:
        return "" if _is_named(victim.config, path, str(error)) else f"was not named: {error}"
    except Exception as error:
        return f"is a bug: {error!r}"
    if not gone or path.name != SIDECAR:
        return "was accepted"
    # Without a sidecar it is a file of Megatron's: new runs say so, and this run is not resumed.
    if dataset.unverified != ["corpus"]:
        return "was accepted without a word"
    victim.dataset, kept = dataset, victim.dataset
    try:
        victim.resume()
    except UserError as error:
        return "" if "data source 'corpus'" in str(error) else f"was not named: {error}"
    finally:
        victim.dataset = kept
    return "was accepted by a run that goes on"


def _is_named(config: Config, path: Path, message: str) -> bool:
    """One line with the file; of a whole one of another build or tokenizer, the two that differ."""
    names = [str(path), path.name]
    if path.name == "tokenizer.model":
        names.append("data.tokenizer")  # it is whole, as far as anyone can say
    elif path.name == SIDECAR:
        names += [str(path.with_suffix("")), "corpus.bin", "corpus.idx"]  # it is another build's
    return "\n" not in message and any(name in message for name in names)
