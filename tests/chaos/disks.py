"""Disks that fail: one that refuses a given operation, one that loses what was not synced.

A power failure leaves of everything that was not synced any part: of a file's bytes any of those
that were appended, with nothing or garbage for the others; of a directory any of the names made,
moved and removed in it, in any combination.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megallama.files import Disk

#: The operations that change a disk.
CHANGES = (
    "mkdir",
    "create",
    "append",
    "sync",
    "sync_names",
    "rename",
    "unlink",
    "rmdir",
)


def refusing(kind: str, call: int, code: int) -> Disk:
    """A disk whose operation of this kind is refused the `call`th time, from 1."""
    disk, real, calls = Disk(), getattr(Disk, kind), 0

    def sometimes(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(code, os.strerror(code))
        return real(disk, *arguments)

    setattr(disk, kind, sometimes)
    return disk


class Counting(Disk):
    """How often each operation was asked for."""

    def __init__(self) -> None:
        self.calls = dict.fromkeys(CHANGES, 0)
        for kind in CHANGES:
            setattr(self, kind, self._counted(kind, getattr(self, kind)))

    def _counted(self, kind: str, real: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            self.calls[kind] += 1
            return real(*arguments)

        return counted


class Entry(NamedTuple):
    """A change of a directory's names: `path` now means `file` (None: nothing, 0: a directory)."""

    path: Path
    file: int | None


class Operation(NamedTuple):
    """`kind` of CHANGES; `file` or `path` that it is about; what is new."""

    kind: str
    file: int = 0
    path: Path = Path()
    data: bytes = b""
    entries: tuple[Entry, ...] = ()


class Recorder(Disk):
    """Does everything, and writes down what changes the disk."""

    def __init__(self) -> None:
        self.log: list[Operation] = []
        self._files: dict[int, int] = {}  # descriptor → file
        self._names: dict[Path, int] = {}
        self._count = 0

    def mkdir(self, directory: Path) -> None:
        super().mkdir(directory)
        self._enter("mkdir", Entry(directory, 0))

    def create(self, path: Path) -> int:
        descriptor = super().create(path)
        self._count += 1
        self._files[descriptor] = self._names[path] = self._count
        self._enter("create", Entry(path, self._count))
        return descriptor

    def append(self, descriptor: int, data: memoryview) -> None:
        super().append(descriptor, data)
        self.log.append(Operation("append", self._files[descriptor], data=bytes(data)))

    def sync(self, descriptor: int) -> None:
        super().sync(descriptor)
        self.log.append(Operation("sync", self._files[descriptor]))

    def sync_names(self, directory: Path) -> None:
        super().sync_names(directory)
        self.log.append(Operation("sync_names", path=directory))

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        file = self._names[target] = self._names.pop(source)
        self._enter("rename", Entry(source, None), Entry(target, file))

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        self._enter("unlink", Entry(path, None))

    def rmdir(self, directory: Path) -> None:
        super().rmdir(directory)
        self._enter("rmdir", Entry(directory, None))

    def _enter(self, kind: str, *entries: Entry) -> None:
        self.log.append(Operation(kind, path=entries[0].path, entries=entries))


@dataclass
class _File:
    synced: bytes = b""
    pending: list[bytes] = field(default_factory=list)


@dataclass
class Platter:
    """What is on the disk for certain, and what may be."""

    root: Path
    files: dict[int, _File] = field(default_factory=dict)
    names: dict[Path, int] = field(default_factory=dict)
    pending: list[Operation] = field(default_factory=list)

    def do(self, operation: Operation) -> None:
        if operation.kind == "append":
            self.files.setdefault(operation.file, _File()).pending.append(operation.data)
        elif operation.kind == "sync":
            file = self.files.setdefault(operation.file, _File())
            file.synced += b"".join(file.pending)
            file.pending.clear()
        elif operation.kind == "sync_names":
            here = [p for p in self.pending if p.path.parent == operation.path]
            self.pending = [p for p in self.pending if p.path.parent != operation.path]
            for change in here:
                _apply(self.names, change)
        else:
            self.pending.append(operation)

    def fail(self, generator: random.Random, target: Path) -> None:
        """Write under `target` what a power failure may leave under the root."""
        likely = generator.choice((0.0, 0.2, 0.5, 0.8, 1.0))
        names = dict(self.names)
        for change in self.pending:
            if generator.random() < likely:
                _apply(names, change)
        directories = {self.root, *(path for path, file in names.items() if file == 0)}
        target.mkdir(parents=True)
        for path in sorted(names):
            if not all(p in directories for p in path.parents if self.root in (p, *p.parents)):
                continue  # its directory is lost
            place = target / path.relative_to(self.root)
            if names[path] == 0:
                place.mkdir()
            else:
                file = self.files.get(names[path], _File())
                place.write_bytes(file.synced + _remains(file.pending, generator))


def _apply(names: dict[Path, int], change: Operation) -> None:
    for path, file in change.entries:
        if file is None:
            names.pop(path, None)
        else:
            names[path] = file


def _remains(pending: Iterable[bytes], generator: random.Random) -> bytes:
    """What may be left of bytes that were not synced."""
    likely = generator.choice((0.0, 0.5, 1.0))
    nothing = generator.choice((bytes, generator.randbytes))
    left = b"".join(d if generator.random() < likely else nothing(len(d)) for d in pending)
    return left[: generator.choice((0, len(left), generator.randint(0, len(left))))]
