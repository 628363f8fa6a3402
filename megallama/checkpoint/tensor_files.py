"""safetensors files read and written a block of rows at a time.

The safetensors library writes a file from tensors that are all in memory, and reads through a map
of the file. Here a model of any size passes through a bounded buffer, and a file that is cut short
while it is read is an error, not a signal.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megallama.errors import ConfigError, CorruptError
from megallama.files import plain_file, read_at, read_plain, refuse_os_errors, sync

#: safetensors' words for the types that weights have.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
WORDS = {dtype: word for word, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # bytes; the safetensors library's own limit
LONGEST_NAME = 500  # characters
MOST_DIMS = 8


_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: safetensors' word for its dtype, its shape, its place in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


class TensorFile:
    """A safetensors file, its header read and held against its size.

    Raises:
        ConfigError: it cannot be opened.
        CorruptError: the header or the size is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.tensors = _read_header(path)
        except _MALFORMED as error:
            raise CorruptError(
                f"{path}: its header or size is damaged ({error}); fetch the file again"
            ) from None

    def read(self, name: str, first: int, rows: int) -> Tensor:
        """Rows `first` … `first + rows` of a tensor (elements of a vector).

        Raises CorruptError where the file has become shorter since it was opened.
        """
        stored = self.tensors[name]
        row_bytes = stored.bytes // stored.shape[0]
        block = torch.empty((rows, *stored.shape[1:]), dtype=DTYPES[stored.dtype])
        with plain_file(self.path) as file:
            offset = stored.offset + first * row_bytes
            read = read_at(file.fileno(), memoryview(as_bytes(block)), offset)
        if read != rows * row_bytes:
            raise CorruptError(f"{self.path}: ends within tensor {name!r}; fetch the file again")
        return block


def write_tensor_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, blocks: Iterable[Tensor]
) -> None:
    """Write and sync a file of tensors of one dtype; `blocks` are their rows, tensor by tensor.

    Raises ConfigError where the disk refuses.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        place = {"shape": list(shape), "data_offsets": [begin, end]}
        header[name] = {"dtype": WORDS[dtype], **place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
    with refuse_os_errors("write", path), open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in blocks:
            file.write(memoryview(as_bytes(block)))
        sync(file)


def as_bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor as a numpy array, without a copy where it is contiguous."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy()


def foreign_file(directory: Path, name: str) -> Path:
    """A file of a directory that others made.

    A link may lead to the directory's own files, or as Hugging Face's cache has it to `blobs`
    beside the snapshots: one that leads elsewhere would have any file read and copied.

    Raises ConfigError where it leads elsewhere.
    """
    path, home = directory / name, directory.resolve()
    allowed = (home, home.parent.parent / "blobs")
    if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in allowed):
        raise ConfigError(f"{path}: is a link that leads out of its directory; put the file there")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object. Raises ConfigError (no file), CorruptError (no object)."""
    raw = read_plain(path, LONGEST_HEADER)
    try:
        body = json.loads(raw, object_pairs_hook=once_each)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise CorruptError(f"{path}: not a JSON object, or damaged; fetch the file again")
    return body


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object that has no key twice, of which two readers may take different ones.

    Raises ValueError for one that has.
    """
    body = dict(pairs)
    if len(body) != len(pairs):
        raise ValueError("a key is there twice")
    return body


def _read_header(path: Path) -> dict[str, Stored]:
    with plain_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(LONGEST_HEADER, size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(file.read(length), object_pairs_hook=once_each)
    header.pop("__metadata__", None)
    tensors = {name: _stored(name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].bytes)):
        if stored.offset != end:
            raise ValueError(f"tensor {name!r} does not begin where the one before it ends")
        end += stored.bytes
    if end != size:
        raise ValueError(f"{size} bytes, and its header tells of {end}")
    return tensors


def _stored(name: str, entry: Mapping[str, Any], begin: int) -> Stored:
    shape = tuple(entry["shape"])
    first, last = entry["data_offsets"]
    numbers = (*shape, first, last)
    if len(name) > LONGEST_NAME or len(shape) > MOST_DIMS:
        raise ValueError("a tensor has a name or a shape that is too long")
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers) or first > last:
        raise ValueError(f"tensor {name!r} is of no shape or place that can be")
    # Other types may stand beside the weights; whoever wants such a tensor refuses it by its type.
    known = DTYPES.get(entry["dtype"])
    if known and last - first != math.prod(shape) * known.itemsize:
        raise ValueError(f"tensor {name!r} of shape {shape} has {last - first} bytes")
    return Stored(entry["dtype"], shape, begin + first, last - first)
