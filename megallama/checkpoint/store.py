"""Save and load a checkpoint directory, and find the ones that a run has.

Tensors go to safetensors files, one a rank, under `kind/name` (`master/norm.weight`); no pickle is
written or read. Every byte that is loaded is checked against its hash first.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megallama.checkpoint.manifest import (
    MANIFEST,
    Entry,
    Manifest,
    Slice,
    entry_from_json,
    read_manifest,
    write_manifest,
)
from megallama.errors import ConfigError, CorruptError
from megallama.files import refuse_os_errors, sync_path

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16}


def checkpoint_path(folder: Path, step: int) -> Path:
    """The directory of the checkpoint after `step`."""
    return folder / f"step-{step:08d}"


def committed_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return [path for path in _directories(folder) if (path / MANIFEST).exists()]


@dataclass(frozen=True)
class Rectangle:
    """What one rank writes of a global tensor: `data` is its rectangle that begins at `start`."""

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    data: Tensor


def begin_checkpoint(directory: Path) -> None:
    """Make the directory; one rank does it, before any writes.

    What is there, such as an unfinished or damaged checkpoint, is deleted.

    Raises:
        ConfigError: the disk refuses; other checkpoints are untouched.
    """
    with refuse_os_errors("write", directory):
        _delete(directory)
        directory.mkdir(parents=True)


def write_rank(directory: Path, rank: int, rectangles: Sequence[Rectangle]) -> str:
    """Write and sync a rank's file; the text returned is for `commit_checkpoint`.

    Raises:
        ConfigError: the disk refuses (no space, no permission).
    """
    if not rectangles:
        return "{}"
    file = directory / f"rank-{rank:05d}.safetensors"
    tensors = {r.name: r.data.detach().contiguous().cpu() for r in rectangles}
    with refuse_os_errors("write", directory):
        try:
            save_file(tensors, file)
        except SafetensorError as error:  # safetensors' own, for the system's refusal too
            raise ConfigError(f"cannot write {file}: {error}") from error
        sync_path(file)
        entries = _describe(file, rectangles)
    return json.dumps({name: asdict(entry) for name, entry in entries.items()})


def commit_checkpoint(directory: Path, ranks: Sequence[str], facts: Manifest) -> None:
    """Make the written files a checkpoint: it exists once this returns and not before.

    `ranks` are what `write_rank` returned; `facts` is the manifest but for its tensors.

    Raises:
        ConfigError: the disk refuses.
    """
    entries: dict[str, Entry] = {}
    for text in ranks:
        for name, raw in json.loads(text).items():
            new = entry_from_json(raw)
            slices = entries[name].slices + new.slices if name in entries else new.slices
            entries[name] = replace(new, slices=slices)
    with refuse_os_errors("write", directory):
        for path in (directory, directory.parent):
            sync_path(path)
    write_manifest(directory, replace(facts, tensors=entries))


def prune_checkpoints(folder: Path, keep: int, newest: Path) -> None:
    """Delete all but the last `keep` finished checkpoints up to `newest`, which was just saved.

    Unfinished ones before it go too. Those after it stay: they are damaged, or the run would have
    begun from them, and are overwritten when it gets there.

    Raises:
        ConfigError: the system refuses.
    """
    kept = [path for path in committed_checkpoints(folder) if path <= newest][-keep:]
    with refuse_os_errors("delete old checkpoints in", folder):
        for directory in _directories(folder):
            if directory < newest and directory not in kept:
                _delete(directory)


def _directories(folder: Path) -> list[Path]:
    """Directories with the name of a checkpoint, finished or not, oldest first."""
    return sorted(folder.glob("step-" + "[0-9]" * 8))


def _delete(directory: Path) -> None:
    """Delete a checkpoint, its manifest first: a kill midway leaves an unfinished one."""
    (directory / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


class Checkpoint:
    """A finished checkpoint, opened for reading.

    Raises:
        ConfigError: there is no such directory.
        CorruptError: the manifest is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise ConfigError(f"{directory}: no such checkpoint directory; check the path")
        self.directory = directory
        self.manifest = read_manifest(directory)
        self._checked: set[str] = set()

    def read(self, name: str, region: tuple[slice, ...] | None = None) -> Tensor:
        """A rectangle of the global tensor, or all of it, verified.

        Raises:
            CorruptError: it is not all there, or a slice's bytes do not match their hash.
        """
        entry = self.manifest.tensors.get(name)
        if entry is None:
            raise CorruptError(f"{self.directory}: holds no tensor {name!r}; use another")
        region = region or tuple(slice(0, n) for n in entry.shape)
        wanted = torch.empty([r.stop - r.start for r in region], dtype=_DTYPES[entry.dtype])
        missing = wanted.numel()
        for piece in entry.slices:
            target, source = _overlap(region, piece)
            if all(s.start < s.stop for s in source):
                raw = torch.frombuffer(self._bytes(name, piece), dtype=wanted.dtype)
                wanted[target] = raw.view(piece.shape)[source]
                missing -= wanted[target].numel()
        if missing:
            raise CorruptError(
                f"{self.directory}: {missing} elements of tensor {name!r} are in no file; use an "
                "older checkpoint"
            )
        return wanted

    def verify(self) -> None:
        """Read everything once; raises CorruptError at the first damage."""
        for name, entry in self.manifest.tensors.items():
            for piece in entry.slices:
                self._bytes(name, piece)

    def _bytes(self, name: str, piece: Slice) -> bytearray:
        path = self.directory / piece.file
        raw = bytearray(piece.bytes)
        try:
            if piece.file not in self._checked:
                self._check_header(path)
                self._checked.add(piece.file)
            with open(path, "rb") as file:
                file.seek(piece.offset)
                read = file.readinto(raw)
        except OSError as error:
            raise CorruptError(f"{path}: {error.strerror}; use an older checkpoint") from None
        if read != piece.bytes or xxhash.xxh3_64_hexdigest(raw) != piece.xxh3:
            raise CorruptError(f"{path}: tensor {name!r} is damaged; use an older checkpoint")
        return raw

    def _check_header(self, path: Path) -> None:
        """Refuse a file whose header or size is not what the manifest says: others read that."""
        expected = {
            name: (entry.dtype, piece.shape, piece.offset, piece.bytes)
            for name, entry in self.manifest.tensors.items()
            for piece in entry.slices
            if piece.file == path.name
        }
        end = max(offset + size for _, _, offset, size in expected.values())
        try:
            intact = _read_header(path) == expected and path.stat().st_size == end
        except (ValueError, KeyError, TypeError, AttributeError):
            intact = False
        if not intact:
            raise CorruptError(f"{path}: its header or size is damaged; use an older checkpoint")


def _read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """The dtype, shape, offset in the file and size in bytes of each tensor of a file."""
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > os.fstat(file.fileno()).st_size:
            raise ValueError("a header longer than its file")
        header = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    found = {}
    for name, tensor in header.items():
        begin, end = tensor["data_offsets"]
        shape = tuple(tensor["shape"])
        found[name] = (tensor["dtype"], shape, 8 + header_bytes + begin, end - begin)
    return found


def _overlap(
    region: tuple[slice, ...], piece: Slice
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a region and a slice of the same tensor meet: within the region, within the slice."""
    target, source = [], []
    for wanted, start, size in zip(region, piece.start, piece.shape, strict=True):
        first, last = max(wanted.start, start), min(wanted.stop, start + size)
        target.append(slice(first - wanted.start, last - wanted.start))
        source.append(slice(first - start, last - start))
    return tuple(target), tuple(source)


def _describe(path: Path, rectangles: Sequence[Rectangle]) -> dict[str, Entry]:
    """The entries of a rank's file, hashed as they were written."""
    placed = {r.name: r for r in rectangles}
    entries = {}
    with open(path, "rb") as file:
        for name, (dtype, shape, offset, size) in _read_header(path).items():
            file.seek(offset)
            digest = xxhash.xxh3_64_hexdigest(file.read(size))
            piece = Slice(path.name, placed[name].start, shape, offset, size, digest)
            entries[name] = Entry(dtype, placed[name].shape, (piece,))
    return entries
