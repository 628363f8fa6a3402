"""Faults of files: what a disk, a copy or a hand may do to them, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


class Region(NamedTuple):
    """Bytes `first` to `last`, without the last."""

    first: int
    last: int


class Others(NamedTuple):
    """Whole files: an older version of the damaged one, and one of the same kind beside it."""

    older: bytes
    sibling: bytes


#: From the bytes, a region of them, other files, and a generator, to other bytes; None: the file is
#: gone.
Fault = Callable[[bytes, Region, Others, random.Random], bytes | None]


def _place(region: Region, generator: random.Random) -> int:
    return generator.randrange(region.first, region.last)


def bit_flip(raw: bytes, region: Region, _: Others, generator: random.Random) -> bytes:
    damaged = bytearray(raw)
    damaged[_place(region, generator)] ^= 1 << generator.randrange(8)
    return bytes(damaged)


def truncation(raw: bytes, region: Region, _: Others, generator: random.Random) -> bytes:
    return raw[: _place(region, generator)]


def swap(raw: bytes, region: Region, others: Others, generator: random.Random) -> bytes:
    """Two runs of bytes, one of them in the region, change places; or two files do."""
    if generator.random() < 0.2:
        return others.sibling
    size = generator.randint(1, min(16, region.last - region.first, len(raw) // 2))
    a = min(_place(region, generator), len(raw) - size)
    free = [*range(a - size + 1), *range(a + size, len(raw) - size + 1)]
    a, b = sorted((a, generator.choice(free)))
    return b"".join(
        (raw[:a], raw[b : b + size], raw[a + size : b], raw[a : a + size], raw[b + size :])
    )


def deletion(raw: bytes, region: Region, _: Others, generator: random.Random) -> bytes | None:
    """Of the file, or of a few of its bytes."""
    if generator.random() < 0.2:
        return None
    at = _place(region, generator)
    return raw[:at] + raw[min(region.last, at + generator.randint(1, 8)) :]


def stale(raw: bytes, region: Region, others: Others, generator: random.Random) -> bytes:
    """The older version, of the file or of the region alone."""
    if generator.random() < 0.5:
        return others.older
    return raw[: region.first] + others.older[region.first : region.last] + raw[region.last :]


def hole(raw: bytes, region: Region, _: Others, generator: random.Random) -> bytes:
    """Zeros, as a write that never came leaves them."""
    a, b = sorted((_place(region, generator), _place(region, generator) + 1))
    return raw[:a] + bytes(b - a) + raw[b:]


def growth(raw: bytes, region: Region, _: Others, generator: random.Random) -> bytes:
    """A few bytes more in the region."""
    at = _place(region, generator) + 1
    return raw[:at] + generator.randbytes(generator.randint(1, 8)) + raw[at:]


FAULTS: Mapping[str, Fault] = {
    "bit flip": bit_flip,
    "truncation": truncation,
    "swap": swap,
    "deletion": deletion,
    "stale copy": stale,
    "hole": hole,
    "growth": growth,
}


@contextmanager
def replaced(path: Path, content: bytes | None) -> Iterator[None]:
    """For a while `path` has this content, or is gone where it is None."""
    whole = path.read_bytes()
    try:
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        yield
    finally:
        path.write_bytes(whole)
