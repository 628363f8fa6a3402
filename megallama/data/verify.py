"""Reads a whole token file and says the first thing that is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from megallama.data.sidecar import BLOCK_BYTES
from megallama.data.token_files import TokenFile, check_vocab, with_suffix
from megallama.data.token_index import TokenIndex
from megallama.data.tokenizer import Tokenizer
from megallama.errors import ConfigError, CorruptError
from megallama.files import plain_file

ROWS = 1 << 20


def verify(file: TokenFile, vocab: int | None = None) -> None:
    """Checks hashes (where there is a sidecar), index and token ids (where a vocabulary is known).

    Raises CorruptError naming the file and the block, document or token offset.
    """
    sidecar = file.sidecar
    if sidecar is not None:
        check_blocks(with_suffix(file.prefix, ".idx"), sidecar.xxh3_idx)
        check_blocks(file.bin_path, sidecar.xxh3_bin)
        vocab = min(vocab or sidecar.vocab_size, sidecar.vocab_size)
    check_index(file.index)
    if vocab is not None:
        for start, length in _pieces(file.tokens):
            check_vocab(file.read(start, length), vocab, str(file.bin_path), start)


def check_blocks(path: Path, digests: list[str]) -> None:
    """Raises CorruptError for the first block of `path` whose hash is not the one in `digests`."""
    with plain_file(path) as stream:
        for block, digest in enumerate(digests):
            if xxhash.xxh3_64_hexdigest(stream.read(BLOCK_BYTES)) != digest:
                start = block * BLOCK_BYTES
                raise CorruptError(
                    f"{path}: block {block} (bytes {start} to {start + BLOCK_BYTES}) is damaged: "
                    "its hash is not the sidecar's"
                )
        if stream.read(1):
            raise CorruptError(f"{path}: longer than the {len(digests)} blocks of its sidecar")


def check_index(index: TokenIndex) -> None:
    """Raises CorruptError unless sequences lie end to end and documents ascend."""
    end = 0
    for start, length in _pieces(len(index.lengths)):
        lengths, offsets = index.lengths.read(start, length), index.offsets.read(start, length)
        ends = end + np.cumsum(lengths) * index.dtype.itemsize
        expected = np.concatenate(([end], ends[:-1]))
        wrong = (lengths < 0) | (offsets != expected)
        if wrong.any():
            at = start + int(np.argmax(wrong))
            raise CorruptError(
                f"{index.path}: sequence {at} has length {lengths[at - start]} and offset "
                f"{offsets[at - start]}: sequences must lie end to end"
            )
        end = int(ends[-1])
    for start, length in _pieces(len(index.documents) - 1):
        wrong = np.diff(index.documents.read(start, length + 1)) < 0
        if wrong.any():
            at = start + int(np.argmax(wrong))
            raise CorruptError(f"{index.path}: document {at} starts after document {at + 1}")


def check_tokenizer(file: TokenFile, tokenizer: Tokenizer) -> None:
    """Raises ConfigError where `file` says that it was built with another tokenizer."""
    if file.sidecar is not None and file.sidecar.tokenizer_hash != tokenizer.hash:
        raise ConfigError(
            f"{file.prefix} was built with tokenizer {file.sidecar.tokenizer_hash}, but "
            f"{tokenizer.path} is {tokenizer.hash}: give the tokenizer it was built with"
        )


def _pieces(total: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, ROWS):
        yield start, min(ROWS, total - start)
