"""Reads tensors of `.pth` files a block of rows at a time: PyTorch's zip archive, unpickled by
PyTorch with `weights_only`.

The file is not mapped: one that is cut underneath would end the process by SIGBUS. PyTorch reads
the names, types and shapes (`map_location="meta"`) and says where each storage lies; the bytes are
read from there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from torch import Tensor

from megallama.checkpoint.tensor_files import LONGEST_NAME, as_bytes
from megallama.errors import CorruptError
from megallama.files import open_plain, read_at, refuse_os_errors

MOST_PICKLE = 64 << 20  # bytes of an archive's pickle, which has names and shapes; usual are 0.1 MB
_FIRST = b"PK\3\4"  # what torch takes for an archive begins so


@dataclass(frozen=True)
class Placed:
    """A tensor in a file: `stride` and `begin` in elements of its storage, `offset` in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    begin: int
    offset: int

    def span(self, first: int, rows: int) -> tuple[int, int]:
        """The first element of some rows, and how many there are from it to their last."""
        ends = [(rows, self.stride[0]), *zip(self.shape[1:], self.stride[1:], strict=True)]
        if any(size == 0 for size, _ in ends):
            return self.begin, 0
        reach = sum((size - 1) * step for size, step in ends)
        return self.begin + first * self.stride[0], reach + 1


class PthFile:
    """The tensors of a `.pth` file; every byte is held against the archive's checksums here.

    Raises:
        ConfigError: it cannot be opened.
        CorruptError: it is damaged, holds anything but a dict of tensors, or is compressed, as
            PyTorch's own archives never are.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_plain(path)
        with refuse_os_errors("read", path):
            try:
                _refuse_odd_archive(self._file)
                self._file.seek(0)
                loaded = torch.load(self._file, map_location="meta", weights_only=True)
                size = os.fstat(self._file.fileno()).st_size
                self.tensors = _placed(loaded, size)
            except OSError:
                raise
            except Exception as error:  # of zipfile, pickle and torch, which have no common one
                reason = str(error) if isinstance(error, _OddError) else type(error).__name__
                raise CorruptError(
                    f"{path}: not a file of tensors alone, or damaged ({reason}); fetch it again"
                ) from None

    def read(self, name: str, first: int, rows: int) -> Tensor:
        """Rows `first` … `first + rows` of a tensor (elements of a vector).

        Raises CorruptError where the file has become shorter since it was opened.
        """
        placed = self.tensors[name]
        start, count = placed.span(first, rows)
        block = torch.empty(count, dtype=placed.dtype)
        offset = placed.offset + start * placed.dtype.itemsize
        with refuse_os_errors("read", self.path):
            read = read_at(self._file.fileno(), memoryview(as_bytes(block)), offset)
        if read != block.nbytes:
            raise CorruptError(f"{self.path}: ends within tensor {name!r}; fetch the file again")
        return block.as_strided((rows, *placed.shape[1:]), placed.stride)


class _OddError(Exception):
    """What is not as PyTorch writes it."""


def _refuse_odd_archive(file: BinaryIO) -> None:
    """Raises _OddError or BadZipFile unless every member is stored as it is, once, and intact.

    Members that are compressed or lie over one another would let a small file take all memory.
    """
    if file.read(len(_FIRST)) != _FIRST:
        raise _OddError("no archive of PyTorch 1.6 or newer")
    with ZipFile(file) as archive:
        members = archive.infolist()
        if any(m.compress_type != ZIP_STORED or m.file_size != m.compress_size for m in members):
            raise _OddError("a member is compressed")
        if sum(m.file_size for m in members) > os.fstat(file.fileno()).st_size:
            raise _OddError("its members are larger than the file")
        if len({m.filename for m in members}) != len(members):
            raise _OddError("a member is there twice")
        for member in members:
            name = member.filename.partition("/")[2]
            if name == "data.pkl" and member.file_size > MOST_PICKLE:
                raise _OddError(f"a pickle of {member.file_size} bytes")
            if name == "byteorder" and archive.read(member) != b"little":
                raise _OddError("not little-endian")
        if damaged := archive.testzip():
            raise BadZipFile(damaged)


def _placed(loaded: object, size: int) -> dict[str, Placed]:
    """Where the tensors lie in a file of `size` bytes. Raises _OddError where one does not."""
    if not isinstance(loaded, dict):
        raise _OddError("no dict of tensors")
    tensors = {}
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise _OddError("no dict of tensors")
        if len(name) > LONGEST_NAME:
            raise _OddError("a tensor has a name that is too long")
        if tensor.layout != torch.strided or tensor.is_quantized or not tensor.dim():
            raise _OddError(f"tensor {name!r} is of an odd kind")
        storage = tensor.untyped_storage()
        offset = storage._checkpoint_offset
        if offset is None:
            raise _OddError(f"tensor {name!r} is not stored")
        placed = Placed(
            tensor.dtype,
            tuple(tensor.shape),
            tensor.stride(),
            int(tensor.storage_offset()),
            offset,
        )
        start, count = placed.span(0, placed.shape[0])
        end = (start + count) * tensor.dtype.itemsize
        if not 0 <= offset <= offset + end <= size or end > storage.nbytes():
            raise _OddError(f"tensor {name!r} reaches out of the file")
        tensors[name] = placed
    return tensors
