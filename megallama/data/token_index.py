"""PREFIX.idx, Megatron's index of a file of tokens, read piece by piece and never mapped.

Little-endian and packed: a header (magic, version 1, dtype code, S sequences, D = documents + 1),
then i32[S] lengths in tokens, i64[S] byte offsets in .bin, i64[D] the first sequence of each
document and lastly S. Megatron's multimodal files append i8[S] modes, which we skip.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megallama.errors import CorruptError
from megallama.files import open_plain, refuse_os_errors

IntArray = npt.NDArray[np.int64]

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\0\0"
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}


class Column:
    """An array of numbers in a file, read piece by piece.

    It is not mapped: where the file is cut underneath, a read ends in an error and a mapping would
    end the process by SIGBUS.
    """

    def __init__(self, path: Path, file: BinaryIO, dtype: str, offset: int, count: int) -> None:
        self._path, self._file, self._offset, self._count = path, file, offset, count
        self._dtype = np.dtype(dtype)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> int:
        number += self._count if number < 0 else 0
        return int(self.read(number, 1)[0])

    def read(self, start: int, length: int) -> IntArray:
        """Numbers [start, start + length). Raises CorruptError where the file is cut."""
        width = self._dtype.itemsize
        with refuse_os_errors("read", self._path):
            raw = os.pread(self._file.fileno(), length * width, self._offset + start * width)
        if len(raw) != length * width:
            raise CorruptError(f"{self._path}: cut short while it is read")
        return np.frombuffer(raw, self._dtype).astype(np.int64)


class TokenIndex:
    """PREFIX.idx: opening it reads the header and the two ends, whatever its size.

    lengths, offsets, documents: the three arrays of the module's docstring.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_plain(path)
        with refuse_os_errors("read", path):
            raw = os.pread(self._file.fileno(), HEADER.size, 0)
            size = os.fstat(self._file.fileno()).st_size
        if len(raw) < HEADER.size:
            raise CorruptError(f"{path}: {size} bytes are too few for an index: empty or truncated")
        magic, version, code, S, D = HEADER.unpack(raw)
        if magic != MAGIC:
            raise CorruptError(f"{path}: not a token index: it starts with {magic!r}")
        if version != 1:
            raise CorruptError(f"{path}: index version {version}, not 1")
        if code not in DTYPES:
            raise CorruptError(f"{path}: dtype code {code} is not one of integers")
        want = HEADER.size + 12 * S + 8 * D
        if size not in (want, want + S):
            raise CorruptError(
                f"{path}: {size} bytes where its header ({S} sequences, {D - 1} documents) "
                f"needs {want}: truncated or damaged"
            )
        if S == 0 or D < 2:
            raise CorruptError(f"{path}: holds no document")
        self.dtype: np.dtype[Any] = np.dtype(DTYPES[code]).newbyteorder("<")
        self.lengths = Column(path, self._file, "<i4", HEADER.size, S)
        self.offsets = Column(path, self._file, "<i8", HEADER.size + 4 * S, S)
        self.documents = Column(path, self._file, "<i8", HEADER.size + 12 * S, D)
        if self.offsets[0] != 0 or self.documents[0] != 0 or self.documents[-1] != S:
            raise CorruptError(f"{path}: damaged: the first or last document is out of place")
        self.bin_bytes = self.offsets[-1] + self.lengths[-1] * self.dtype.itemsize

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def document_start(self, document: int) -> int:
        """The first token of a document; of the document after the last, the count of tokens."""
        sequence = self.documents[document]
        if not 0 <= sequence <= len(self.offsets):
            raise CorruptError(f"{self.path}: document {document} starts at sequence {sequence}")
        offset = self.bin_bytes if sequence == len(self.offsets) else self.offsets[sequence]
        return offset // self.dtype.itemsize
