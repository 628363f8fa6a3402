"""Open a checkpoint directory and read any region of it, every byte checked against its hash first.

Files are read and never mapped: one that is cut underneath is an error, where a mapping would end
the process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from megallama.checkpoint.coverage import Tiling
from megallama.checkpoint.manifest import Entry, RankFile, Slice, read_manifest, unreadable
from megallama.checkpoint.rank_file import DTYPES, Held, Table, read_header, read_table
from megallama.errors import ConfigError, CorruptError
from megallama.files import Disk

DISK = Disk()  # it has no state

Region = tuple[slice, ...]


@dataclass(frozen=True)
class Want:
    """A region of a global tensor, and the tensor of its shape that it is to be read into."""

    name: str
    region: Region
    target: Tensor


class Checkpoint:
    """A finished checkpoint, opened for reading.

    Raises:
        ConfigError: there is no such directory, or its format is of another version.
        CorruptError: the manifest is missing or damaged.
    """

    def __init__(self, directory: Path, disk: Disk = DISK) -> None:
        if not directory.is_dir():
            raise ConfigError(f"{directory}: no such checkpoint directory; check the path")
        self.directory = directory
        self._disk = disk
        manifest = read_manifest(directory, disk)
        entries = {
            name: replace(entry, find=partial(self._slices, name))
            for name, entry in manifest.tensors.items()
        }
        self.manifest = replace(manifest, tensors=entries)
        self._numbers = {name: number for number, name in enumerate(entries)}
        self._tables: dict[str, Table] = {}

    def read(self, name: str, region: Region | None = None) -> Tensor:
        """A rectangle of the global tensor, or all of it, verified.

        Raises:
            CorruptError: it is not all there, or a slice's bytes do not match their hash.
        """
        entry = self._entry(name)
        region = region or tuple(slice(0, n) for n in entry.shape)
        target = torch.empty([r.stop - r.start for r in region], dtype=DTYPES[entry.dtype])
        self._fill([Want(name, region, target)], self._files(0), keep_tables=True)
        return target

    def fill(self, wants: Iterable[Want], near: int = 0) -> None:
        """Read many regions, file by file, each block verified before it is copied to its target.

        Files of ranks near `near` come first, and none is opened once all is there: a rank that
        resumes in its own layout opens its own. What is held meanwhile is one file's table and one
        block.

        Raises:
            CorruptError: as `read`; targets may have been written to.
        """
        self._fill(list(wants), self._files(near), keep_tables=False)

    def _slices(self, name: str) -> list[Slice]:
        number = self._number(name)
        return [
            piece
            for file in self.manifest.files
            if file.may_hold(number)
            for piece in self._held(file, self._table(file), name).slices(file.name)
        ]

    def verify(self) -> None:
        """Read everything once; raises CorruptError at the first damage."""
        tilings = {name: Tiling(entry.shape) for name, entry in self.manifest.tensors.items()}
        for file in self.manifest.files:
            path = self.directory / file.name
            with opened(path, file, self._disk) as (descriptor, table):
                for name in table:
                    held = self._held(file, table, name)
                    tilings[name].add(held.start, held.shape)
                    for piece in held.slices(file.name):
                        read_slice(path, name, piece, descriptor, self._disk)
        refuse_gaps(self.directory, tilings)

    def _held(self, file: RankFile, table: Table, name: str) -> Held:
        """What a file has of a tensor. Raises CorruptError where it is not the manifest's."""
        held, entry = table[name], self._entry(name)
        if (held.dtype, held.whole) != (entry.dtype, entry.shape):
            raise CorruptError(
                f"{self.directory / file.name}: tensor {name!r} is not the manifest's; use an "
                "older checkpoint"
            )
        return held

    def _number(self, name: str) -> int:
        self._entry(name)
        return self._numbers[name]

    def _entry(self, name: str) -> Entry:
        entry = self.manifest.tensors.get(name)
        if entry is None:
            raise CorruptError(f"{self.directory}: holds no tensor {name!r}; use another")
        return entry

    def _files(self, near: int) -> list[RankFile]:
        def distance(file: RankFile) -> int:
            return abs(int(file.name[5:].partition(".")[0]) - near)

        return sorted(self.manifest.files, key=distance)

    def _table(self, file: RankFile) -> Table:
        if file.name not in self._tables:
            with opened(self.directory / file.name, file, self._disk) as (_, table):
                self._tables[file.name] = table
        return self._tables[file.name]

    def _fill(self, wants: list[Want], files: Sequence[RankFile], *, keep_tables: bool) -> None:
        """`keep_tables`: for who comes back for another tensor."""
        open_wants: dict[str, list[Want]] = {}
        for want in wants:
            open_wants.setdefault(want.name, []).append(want)
        numbers = {name: self._number(name) for name in open_wants}
        missing = {name: sum(w.target.numel() for w in ws) for name, ws in open_wants.items()}
        for file in files:
            mask = int(file.holds, 16)
            names = [name for name, count in missing.items() if count and mask >> numbers[name] & 1]
            if not names:
                continue
            path = self.directory / file.name
            known = self._tables.get(file.name)
            with opened(path, file, self._disk, known) as (descriptor, table):
                if keep_tables:
                    self._tables[file.name] = table
                for name in names:
                    held = self._held(file, table, name)
                    for want in open_wants[name]:
                        missing[name] -= self._copy(path, held, want, descriptor)
        for name, count in missing.items():
            if count:
                raise CorruptError(
                    f"{self.directory}: {count} elements of tensor {name!r} are in no file; use an "
                    "older checkpoint"
                )

    def _copy(self, path: Path, held: Held, want: Want, descriptor: int) -> int:
        """Copy what a file has of a region; the number of elements."""
        copied = 0
        for piece in held.slices(path.name):
            target, source = _overlap(want.region, piece)
            if all(s.start < s.stop for s in source):
                raw = read_slice(path, want.name, piece, descriptor, self._disk)
                block = torch.frombuffer(raw, dtype=DTYPES[held.dtype]).view(piece.shape)
                part = block[source]
                want.target[target].copy_(part)
                copied += part.numel()
        return copied


@contextmanager
def opened(
    path: Path, file: RankFile, disk: Disk, known: Table | None = None
) -> Iterator[tuple[int, Table]]:
    """A rank's file, open, and its table, once its size and header are found intact.

    Raises:
        CorruptError: they are not.
        LostError: the file server is gone.
    """
    with _reading(path, disk) as descriptor:
        if known is None:
            try:
                known = read_table(path, descriptor, file, disk)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise _damaged_header(path) from None
        yield descriptor, known


def check_header(path: Path, file: RankFile, disk: Disk) -> None:
    """Hold a file's size and header against what its rank said, and parse nothing. Raises as
    `opened`."""
    with _reading(path, disk) as descriptor:
        try:
            read_header(descriptor, file, disk)
        except ValueError:
            raise _damaged_header(path) from None


@contextmanager
def _reading(path: Path, disk: Disk) -> Iterator[int]:
    try:
        with disk.reading(path) as descriptor:
            yield descriptor
    except OSError as error:
        raise unreadable(path, error) from None


def _damaged_header(path: Path) -> CorruptError:
    return CorruptError(f"{path}: its header or size is damaged; use an older checkpoint")


def read_slice(path: Path, name: str, piece: Slice, descriptor: int, disk: Disk) -> bytearray:
    """A slice's bytes. Raises CorruptError where they are not what its hash says."""
    raw = bytearray(piece.bytes)
    read = disk.read_into(descriptor, memoryview(raw), piece.offset)
    if read != piece.bytes or xxhash.xxh3_64_hexdigest(raw) != piece.xxh3:
        raise CorruptError(f"{path}: tensor {name!r} is damaged; use an older checkpoint")
    return raw


def refuse_gaps(directory: Path, tilings: Mapping[str, Tiling]) -> None:
    """Raises CorruptError for a tensor with a hole, or with an element in two slices."""
    for name, tiling in tilings.items():
        if fault := tiling.fault():
            raise CorruptError(f"{directory}: tensor {name!r}: {fault}; use an older checkpoint")


def _overlap(region: Region, piece: Slice) -> tuple[Region, Region]:
    """Where a region and a slice of the same tensor meet: within the region, within the slice."""
    target, source = [], []
    for wanted, start, size in zip(region, piece.start, piece.shape, strict=True):
        first, last = max(wanted.start, start), min(wanted.stop, start + size)
        target.append(slice(first - wanted.start, last - wanted.start))
        source.append(slice(first - start, last - start))
    return tuple(target), tuple(source)
