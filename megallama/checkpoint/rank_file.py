"""One rank's file: a safetensors file whose header also says what each tensor is a rectangle of.

The header's `__metadata__` has, for every tensor, the shape of the global tensor, where the
rectangle begins in it, and the xxh3 of its rows, block by block: a reader of a few rows reads and
verifies the blocks that have them. The header's own hash is in the manifest, so a table of its own,
and 2,048 files more, are not needed. Any reader of safetensors reads the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from megallama.checkpoint.manifest import MOST_DIMS, RankFile, Slice
from megallama.errors import CorruptError
from megallama.files import Disk

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16}
WORDS = {dtype: word for word, dtype in DTYPES.items()}
#: Bytes of a block, unless one row is longer: what a reader holds beside what it reads into.
BLOCK_BYTES = 16 << 20
TABLE = "megallama"


@dataclass(frozen=True)
class Rectangle:
    """What one rank writes of a global tensor: `data` is its rectangle that begins at `start`."""

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    data: Tensor


@dataclass(frozen=True)
class Held:
    """A file's rectangle of a global tensor of `whole` shape.

    `offset`: bytes from the file's first. `hashes` are of `rows` rows each, the last of the rest.
    """

    dtype: str
    whole: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int
    rows: int
    hashes: tuple[str, ...]

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * DTYPES[self.dtype].itemsize

    def slices(self, file: str) -> Iterator[Slice]:
        """Its blocks, which are what is read and verified."""
        for number, digest in enumerate(self.hashes):
            first = number * self.rows
            rows = min(self.rows, self.shape[0] - first)
            yield Slice(
                file,
                (self.start[0] + first, *self.start[1:]),
                (rows, *self.shape[1:]),
                self.offset + first * self.row_bytes,
                rows * self.row_bytes,
                digest,
            )


class Table:
    """What a file holds, by the tensors' names.

    Each `Held` is made when it is asked for: at 2,048 ranks there are two million in the headers.
    """

    def __init__(self, path: Path, header: bytearray, size: int) -> None:
        self._path, self._begin, self._size = path, len(header), size
        self._tensors: dict[str, Any] = json.loads(header[8:])
        self._more: dict[str, Any] = json.loads(self._tensors.pop("__metadata__")[TABLE])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __getitem__(self, name: str) -> Held:
        """Raises CorruptError where there is none such, or one that cannot be."""
        try:
            tensor, more = self._tensors[name], self._more[name]
            held = Held(
                tensor["dtype"],
                tuple(more["shape"]),
                tuple(more["start"]),
                tuple(tensor["shape"]),
                self._begin + tensor["data_offsets"][0],
                more["rows"],
                tuple(more["xxh3"]),
            )
            right = _can_be(held, self._size)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            right = False
        if not right:
            raise CorruptError(
                f"{self._path}: its header has no {name!r} that can be; use an older checkpoint"
            )
        return held


def _can_be(held: Held, size: int) -> bool:
    """Whether a rectangle lies in its tensor and in a file of `size` bytes. A header's hash is no
    signature: one that is crafted must not have memory taken or other bytes read."""
    numbers = (*held.whole, *held.start, *held.shape, held.offset, held.rows)
    return (
        all(type(n) is int and 0 <= n < 2**63 for n in numbers)
        and 0 < len(held.whole) == len(held.start) == len(held.shape) <= MOST_DIMS
        and all(n > 0 for n in (*held.shape, held.rows))
        and all(a + n <= end for a, n, end in zip(held.start, held.shape, held.whole, strict=True))
        and held.rows * held.row_bytes <= max(BLOCK_BYTES, held.row_bytes)
        and len(held.hashes) == -(-held.shape[0] // held.rows)
        and held.offset + held.shape[0] * held.row_bytes <= size
    )


def write_rank_file(path: Path, rectangles: Sequence[Rectangle], disk: Disk) -> RankFile:
    """Write and sync a file; one tensor at a time is copied to the host. Raises OSError."""
    # Widest first, as safetensors has it: every tensor is aligned to its elements.
    ordered = sorted(rectangles, key=lambda r: -r.data.element_size())
    header = _header(ordered)

    def chunks() -> Iterator[bytes | memoryview]:
        yield header
        for rectangle in ordered:
            yield _bytes(rectangle.data)

    disk.write_new(path, chunks())
    size = len(header) + sum(r.data.nbytes for r in ordered)
    return RankFile(path.name, size, len(header), xxhash.xxh3_128_hexdigest(header))


def read_header(descriptor: int, file: RankFile, disk: Disk) -> bytearray:
    """The bytes of a file's header, verified.

    Raises:
        ValueError: the file's size or header is not what the manifest says.
        OSError: it cannot be read.
    """
    raw = bytearray(file.header_bytes)
    if disk.size(descriptor) != file.bytes:
        raise ValueError("size")
    if disk.read_into(descriptor, memoryview(raw), 0) != len(raw):
        raise ValueError("cut")
    if xxhash.xxh3_128_hexdigest(raw) != file.xxh3:
        raise ValueError("header")
    return raw


def read_table(path: Path, descriptor: int, file: RankFile, disk: Disk) -> Table:
    """What a file holds, by its verified header. Raises as `read_header`."""
    return Table(path, read_header(descriptor, file, disk), file.bytes)


def _header(rectangles: Sequence[Rectangle]) -> bytes:
    """The eight bytes of a length and the JSON that they count, blanks to a multiple of eight."""
    tensors: dict[str, Any] = {}
    table: dict[str, Any] = {}
    offset = 0
    for r in rectangles:
        data = _bytes(r.data)
        tensors[r.name] = {
            "dtype": WORDS[r.data.dtype],
            "shape": list(r.data.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        row_bytes = max(1, len(data) // max(1, len(r.data)))
        rows = max(1, BLOCK_BYTES // row_bytes)
        block = rows * row_bytes
        hashes = [
            xxhash.xxh3_64_hexdigest(data[at : at + block]) for at in range(0, len(data), block)
        ]
        table[r.name] = {"shape": r.shape, "start": r.start, "rows": rows, "xxh3": hashes}
        offset += len(data)
    body = {"__metadata__": {TABLE: json.dumps(table, separators=(",", ":"))}, **tensors}
    text = json.dumps(body, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in row order, copied only where they lie otherwise or on a device."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)
