"""PREFIX.json, the sidecar of a token file: what Megatron's index does not say.

It holds the tokenizer's hash, the vocabulary, and a hash of every 16 MiB block of .bin and .idx, so
that damage is found and named. It ends with a hash of itself.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import xxhash

from megallama.errors import ConfigError, CorruptError
from megallama.files import read_plain

FORMAT = "megallama-tokens-1"
BLOCK_BYTES = 16 << 20
MOST_BYTES = 1 << 30  # of a sidecar: the hashes of 400 TiB


@dataclass(frozen=True)
class Sidecar:
    """What is known of a token file. Hashes are xxh3, in hexadecimal.

    unigram_entropy_nats: the entropy of the file's token frequencies, <s> and </s> counted: the
        loss of a model that knows the frequencies and nothing else.
    documents_with_u2581: documents whose U+2581 became spaces.
    """

    tokenizer_hash: str
    vocab_size: int
    tokens: int
    documents: int
    dtype: str
    unigram_entropy_nats: float
    documents_with_u2581: int
    xxh3_bin: list[str]
    xxh3_idx: list[str]

    def dumps(self) -> bytes:
        """The sidecar file's bytes."""
        return _dumps({"format": FORMAT, **asdict(self)})


def load_sidecar(path: Path) -> Sidecar | None:
    """Reads a sidecar; None where there is none (a file of Megatron's own).

    Raises CorruptError where the file has changed since it was written, ConfigError where another
    version of megallama wrote it.
    """
    if not path.exists():
        return None
    raw = read_plain(path, MOST_BYTES)
    try:
        fields = json.loads(raw)
        del fields["xxh3_self"]
        intact = _dumps(fields) == raw
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CorruptError(f"{path}: damaged: not a token file's sidecar") from None
    if not intact:
        raise CorruptError(f"{path}: damaged: its content does not match its own hash")
    if fields.pop("format", None) != FORMAT:
        raise ConfigError(f"{path}: not of format {FORMAT!r}; build the token file again")
    if not _has_types(fields):
        raise CorruptError(f"{path}: damaged: a key is missing or of another type")
    return Sidecar(**fields)


def _has_types(fields: dict[str, Any]) -> bool:
    """Whether the keys are a sidecar's and their values of its types: a hash is no signature."""
    types = get_type_hints(Sidecar)
    return fields.keys() == types.keys() and all(
        type(fields[name]) is (get_origin(kind) or kind) for name, kind in types.items()
    )


def _dumps(fields: dict[str, object]) -> bytes:
    digest = xxhash.xxh3_64_hexdigest(json.dumps(fields).encode())
    return json.dumps({**fields, "xxh3_self": digest}, indent=1).encode() + b"\n"


class BlockHasher:
    """Hashes a stream of bytes in blocks of BLOCK_BYTES."""

    def __init__(self) -> None:
        self._done: list[str] = []
        self._block = xxhash.xxh3_64()
        self._filled = 0

    def update(self, raw: bytes | memoryview) -> None:
        """Takes the next bytes of the stream."""
        view = memoryview(raw).cast("B")
        while view:
            part = view[: BLOCK_BYTES - self._filled]
            self._block.update(part)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == BLOCK_BYTES:
                self._close()

    def digests(self) -> list[str]:
        """The hashes of all blocks; the last may be short."""
        if self._filled:
            self._close()
        return self._done

    def _close(self) -> None:
        self._done.append(self._block.hexdigest())
        self._block, self._filled = xxhash.xxh3_64(), 0
