"""Save and load a checkpoint directory, and find the ones that a run has.

Tensors go to safetensors files, one a rank, under `kind/name` (`master/norm.weight`); no pickle is
written or read. Every byte that is loaded is checked against its hash first.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from megallama.checkpoint.coverage import Tiling
from megallama.checkpoint.manifest import (
    MANIFEST,
    Entry,
    Manifest,
    RankFile,
    Slice,
    holds,
    read_manifest,
    unreadable,
    write_manifest,
)
from megallama.checkpoint.rank_file import (
    DTYPES,
    Held,
    Table,
    read_table,
    write_rank_file,
)
from megallama.checkpoint.rank_file import Rectangle as Rectangle  # part of this face
from megallama.errors import ConfigError, CorruptError
from megallama.files import Disk, refuse_os_errors

DISK = Disk()  # it has no state

Region = tuple[slice, ...]


def checkpoint_path(folder: Path, step: int) -> Path:
    """The directory of the checkpoint after `step`."""
    return folder / f"step-{step:08d}"


def committed_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    return [path for path in _directories(folder) if (path / MANIFEST).exists()]


def begin_checkpoint(directory: Path, room: int = 0, disk: Disk = DISK) -> None:
    """Make the directory; one rank does it, before any writes.

    What is there, such as an unfinished or damaged checkpoint, is deleted. `room`: bytes that the
    checkpoint will take.

    Raises:
        ConfigError: the disk refuses, or has less room; other checkpoints are untouched.
    """
    with refuse_os_errors("write", directory):
        delete_checkpoint(directory, disk)
        disk.make(directory.parent)
        free = disk.free_bytes(directory.parent)
        if free < room:
            raise ConfigError(
                f"cannot write {directory}: it takes {room / 2**30:.2f} GiB and the disk has "
                f"{free / 2**30:.2f} GiB; free some, or lower checkpoint.keep"
            )
        disk.make(directory)


def write_rank(
    directory: Path, rank: int, rectangles: Sequence[Rectangle], disk: Disk = DISK
) -> str:
    """Write, sync and read back a rank's file; the text returned is for `commit_checkpoint`.

    Raises:
        ConfigError: the disk refuses (no space, no permission).
        CorruptError: what the disk has is not what was written.
    """
    if not rectangles:
        return ""
    path = directory / f"rank-{rank:05d}.safetensors"
    with refuse_os_errors("write", path):
        file = write_rank_file(path, rectangles, disk)
    with _opened(path, file, disk) as (descriptor, table):
        disk.forget(descriptor)
        for name in table:
            for piece in table[name].slices(path.name):
                _read(path, name, piece, descriptor, disk)
    return json.dumps(asdict(file))


def commit_checkpoint(
    directory: Path, ranks: Iterable[str], facts: Manifest, disk: Disk = DISK
) -> None:
    """Make the written files a checkpoint: it exists once this returns and not before.

    `ranks` are what `write_rank` returned; `facts` is the manifest but for its tensors and files.

    Raises:
        ConfigError: the disk refuses.
        CorruptError: the files are not as written, or do not hold every element of their tensors
            once.
    """
    files = [RankFile(**json.loads(text)) for text in ranks if text]
    tensors: dict[str, Entry] = {}
    tilings: dict[str, Tiling] = {}
    held_by: list[set[str]] = []
    for file in files:
        path = directory / file.name
        with _opened(path, file, disk) as (_, table):
            held_by.append(set(table))
        for name in table:
            held = table[name]
            entry = Entry(held.dtype, held.whole)
            if tensors.setdefault(name, entry) != entry:
                raise CorruptError(f"{path}: tensor {name!r} is {entry}, not {tensors[name]}")
            tilings.setdefault(name, Tiling(held.whole)).add(held.start, held.shape)
    _refuse_gaps(directory, tilings)
    listed = tuple(
        replace(file, holds=holds(tensors, names))
        for file, names in zip(files, held_by, strict=True)
    )
    manifest = replace(facts, tensors=tensors, files=listed)
    with refuse_os_errors("write", directory / MANIFEST):
        disk.sync_names(directory)
        write_manifest(directory, manifest, disk)
    if read_manifest(directory, disk) != _as_json(manifest):
        raise CorruptError(f"{directory / MANIFEST}: the disk has other bytes than were written")


def prune_checkpoints(
    folder: Path, keep: int, newest: Path, keep_every: int = 0, disk: Disk = DISK
) -> None:
    """Delete all but the last `keep` finished checkpoints up to `newest`, which was just saved.

    Those of steps that are multiples of `keep_every` stay (0: none does). Unfinished ones before
    `newest` go too. Those after it stay: they are damaged, or the run would have begun from them,
    and are overwritten when it gets there.

    Raises:
        ConfigError: the system refuses.
    """
    finished = [path for path in committed_checkpoints(folder) if path <= newest]
    kept = {*finished[-keep:]}
    if keep_every:
        kept |= {path for path in finished if int(path.name[5:]) % keep_every == 0}
    with refuse_os_errors("delete old checkpoints in", folder):
        for directory in _directories(folder):
            if directory < newest and directory not in kept:
                delete_checkpoint(directory, disk)


def delete_checkpoint(directory: Path, disk: Disk = DISK) -> None:
    """Delete a checkpoint, its manifest first: a kill midway leaves an unfinished one.

    Raises OSError.
    """
    if not directory.is_dir():
        return
    if (directory / MANIFEST).exists():
        disk.unlink(directory / MANIFEST)
        disk.sync_names(directory)  # or a power failure might leave the manifest alone
    for path in sorted(directory.iterdir()):
        if path.is_symlink() or not path.is_dir():
            disk.unlink(path)
    try:
        disk.rmdir(directory)
    except OSError as error:  # what is not ours stays, and so does an open file's name on NFS
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    disk.sync_names(directory.parent)


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
            for piece in self._table(file)[name].slices(file.name)
        ]

    def verify(self) -> None:
        """Read everything once; raises CorruptError at the first damage."""
        tilings = {name: Tiling(entry.shape) for name, entry in self.manifest.tensors.items()}
        for file in self.manifest.files:
            path = self.directory / file.name
            with _opened(path, file, self._disk) as (descriptor, table):
                for name in table:
                    held = table[name]
                    tilings[name].add(held.start, held.shape)
                    for piece in held.slices(file.name):
                        _read(path, name, piece, descriptor, self._disk)
        _refuse_gaps(self.directory, tilings)

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
            with _opened(self.directory / file.name, file, self._disk) as (_, table):
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
            with _opened(path, file, self._disk, known) as (descriptor, table):
                if keep_tables:
                    self._tables[file.name] = table
                for name in names:
                    held = table[name]
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
                raw = _read(path, want.name, piece, descriptor, self._disk)
                block = torch.frombuffer(raw, dtype=DTYPES[held.dtype]).view(piece.shape)
                part = block[source]
                want.target[target].copy_(part)
                copied += part.numel()
        return copied


@contextmanager
def _opened(
    path: Path, file: RankFile, disk: Disk, known: Table | None = None
) -> Iterator[tuple[int, Table]]:
    """A rank's file, open, and its table, once its size and header are found intact."""
    try:
        with disk.reading(path) as descriptor:
            if known is None:
                try:
                    known = read_table(descriptor, file, disk)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    raise CorruptError(
                        f"{path}: its header or size is damaged; use an older checkpoint"
                    ) from None
            yield descriptor, known
    except OSError as error:
        raise unreadable(path, error) from None


def _read(path: Path, name: str, piece: Slice, descriptor: int, disk: Disk) -> bytearray:
    """A slice's bytes. Raises CorruptError where they are not what its hash says."""
    raw = bytearray(piece.bytes)
    read = disk.read_into(descriptor, memoryview(raw), piece.offset)
    if read != piece.bytes or xxhash.xxh3_64_hexdigest(raw) != piece.xxh3:
        raise CorruptError(f"{path}: tensor {name!r} is damaged; use an older checkpoint")
    return raw


def _refuse_gaps(directory: Path, tilings: Mapping[str, Tiling]) -> None:
    for name, tiling in tilings.items():
        if fault := tiling.fault():
            raise CorruptError(f"{directory}: tensor {name!r}: {fault}; use an older checkpoint")


def _as_json(manifest: Manifest) -> Manifest:
    """As it is once it was read: state and config may have tuples for lists."""
    state, config = (json.loads(json.dumps(part)) for part in (manifest.state, manifest.config))
    return replace(manifest, state=state, config=config)


def _directories(folder: Path) -> list[Path]:
    """Directories with the name of a checkpoint, finished or not, oldest first."""
    return sorted(folder.glob("step-" + "[0-9]" * 8))


def _overlap(region: Region, piece: Slice) -> tuple[Region, Region]:
    """Where a region and a slice of the same tensor meet: within the region, within the slice."""
    target, source = [], []
    for wanted, start, size in zip(region, piece.start, piece.shape, strict=True):
        first, last = max(wanted.start, start), min(wanted.stop, start + size)
        target.append(slice(first - wanted.start, last - wanted.start))
        source.append(slice(first - start, last - start))
    return tuple(target), tuple(source)
