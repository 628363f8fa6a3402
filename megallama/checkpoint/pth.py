"""Writes `.pth` files a block at a time: PyTorch's zip archive of one pickle and raw storages.

`torch.save` writes from tensors that are all in memory. Here each storage is streamed, so the
memory needed does not grow with the file. `torch.load(weights_only=True, mmap=True)` reads the
result. Nothing is unpickled here.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile, ZipInfo

import torch
from torch import Tensor

from megallama.checkpoint.tensor_files import as_bytes
from megallama.files import refuse_os_errors, sync

_ALIGNMENT = 64  # bytes, PyTorch's: a mapped file's tensors begin where vector loads like it
_LOCAL_HEADER, _ZIP64_EXTRA = 30, 20  # bytes of a member's header, and of its field of long sizes
_STORAGES = {
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
}


class _Storage:
    """Stands in the pickle for a storage whose bytes are a member of the archive."""

    def __init__(self, dtype: torch.dtype, key: str, numel: int) -> None:
        self.identity = ("storage", _STORAGES[dtype], key, "cpu", numel)


class _Contiguous:
    """Pickles as a contiguous tensor that begins its storage."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]) -> None:
        self._storage, self._shape = storage, shape

    def __reduce__(self) -> tuple[Any, ...]:
        stride = tuple(math.prod(self._shape[i + 1 :]) for i in range(len(self._shape)))
        hooks: OrderedDict[str, Any] = OrderedDict()  # none, as of any tensor that is saved
        arguments = (self._storage, 0, self._shape, stride, False, hooks)
        return torch._utils._rebuild_tensor_v2, arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.identity if isinstance(obj, _Storage) else None


class PthWriter:
    """A `.pth` file of a dict of named tensors of one dtype, which come in the dict's order."""

    def __init__(
        self,
        file: IO[bytes],
        archive: ZipFile,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
    ) -> None:
        self._file, self._zip = file, archive
        self._keys = {name: str(number) for number, name in enumerate(shapes)}
        tensors = {
            name: _Contiguous(_Storage(dtype, self._keys[name], math.prod(shape)), shape)
            for name, shape in shapes.items()
        }
        body = io.BytesIO()
        _Pickler(body, protocol=2).dump(tensors)
        self._write("data.pkl", body.getvalue())
        self._write("byteorder", b"little")

    @contextmanager
    def tensor(self, name: str) -> Iterator[IO[bytes]]:
        """The member that takes a tensor's rows, through `write_block`."""
        with self._member(f"data/{self._keys[name]}") as member:
            yield member

    def end(self) -> None:
        """Write what ends the archive, after the last tensor."""
        self._write("version", b"3\n")

    def _write(self, name: str, content: bytes) -> None:
        with self._member(name) as member:
            member.write(content)

    @contextmanager
    def _member(self, name: str) -> Iterator[IO[bytes]]:
        info = ZipInfo(f"archive/{name}")
        data = self._file.tell() + _LOCAL_HEADER + len(info.filename) + _ZIP64_EXTRA + 4
        info.extra = b"FB" + (-data % _ALIGNMENT).to_bytes(2, "little") + bytes(-data % _ALIGNMENT)
        with self._zip.open(info, "w", force_zip64=True) as member:
            yield member


def write_block(member: IO[bytes], block: Tensor) -> None:
    """Append the rows of a block to a tensor's member."""
    member.write(memoryview(as_bytes(block)))


@contextmanager
def pth_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> Iterator[PthWriter]:
    """Yields the writer of a file that is complete and synced once the block has ended.

    Every tensor of `shapes` must be written, in that order. Raises ConfigError where the disk
    refuses.
    """
    with refuse_os_errors("write", path), open(path, "wb") as file:
        with ZipFile(file, "w") as archive:
            writer = PthWriter(file, archive, shapes, dtype)
            yield writer
            writer.end()
        sync(file)
