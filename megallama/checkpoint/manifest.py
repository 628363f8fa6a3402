"""The manifest: what a checkpoint holds, independent of the layout that wrote it.

`manifest.json` is written last and by rename, so a directory that has one is complete. It names
every global tensor with its dtype and shape, and every rank's file with its size and the xxh3 of
its header, which in turn has the place and the xxh3 of every slice; plus the trainer's state, the
config and the tokenizer's hash. Its own hash is its last key.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import xxhash

from megallama.errors import ConfigError, CorruptError, LostError
from megallama.files import LOST, Disk, partial_path

MANIFEST = "manifest.json"
FORMAT = "megallama-checkpoint"
VERSION = 2
FILE_NAME = re.compile(r"rank-\d{5,}\.safetensors")
#: Bytes. At 2,048 ranks and 65B parameters a manifest has about a thousandth of that.
MOST_BYTES = 1 << 30
#: Bytes of a rank's header; likewise 0.4 MiB.
MOST_HEADER = 100_000_000
MOST_DIMS = 8
#: safetensors' words for what a checkpoint has.
DTYPES = ("F64", "F32", "BF16")


@dataclass(frozen=True)
class Slice:
    """Rows of a global tensor's rectangle: where they lie in it and in the file, and their hash."""

    file: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int
    bytes: int
    xxh3: str


@dataclass(frozen=True)
class Entry:
    """A global tensor. `dtype` is safetensors' word for it (F32, BF16, …).

    `find` looks its slices up in an opened checkpoint; they are not in the manifest.
    """

    dtype: str
    shape: tuple[int, ...]
    find: Callable[[], list[Slice]] = field(default=list, repr=False, compare=False)

    @property
    def slices(self) -> list[Slice]:
        """Where the tensor lies: the blocks that are read and verified whole.

        Raises CorruptError where the header of a file that has some is damaged.
        """
        return self.find()


@dataclass(frozen=True)
class RankFile:
    """What one rank wrote: the file's size, and size and xxh3 of the header that it begins with.

    `holds` has bit i set where the file has slices of tensor i in the manifest's order, written as
    hexadecimal: who reads a tensor opens the headers of those files only.
    """

    name: str
    bytes: int
    header_bytes: int
    xxh3: str
    holds: str = "0"

    def may_hold(self, tensor: int) -> bool:
        return bool(int(self.holds, 16) >> tensor & 1)


@dataclass(frozen=True)
class Manifest:
    """`state` is the trainer's (step, samples consumed, …), `config` the run's, both plain JSON.

    `tokenizer_hash` and `sources`, a fingerprint of each source's token files, say what the run is
    trained on.
    """

    state: dict[str, Any]
    config: dict[str, Any]
    tokenizer_hash: str | None
    sources: dict[str, str]
    tensors: dict[str, Entry] = field(default_factory=dict)
    files: tuple[RankFile, ...] = ()


def holds(tensors: Collection[str], held: Collection[str]) -> str:
    """`RankFile.holds` of a file with slices of the `held` ones among all `tensors`."""
    return f"{sum(1 << number for number, name in enumerate(tensors) if name in held):x}"


def write_manifest(directory: Path, manifest: Manifest, disk: Disk) -> None:
    """Commit a checkpoint whose files are already on the disk. Raises OSError."""
    tensors = {n: {"dtype": e.dtype, "shape": e.shape} for n, e in manifest.tensors.items()}
    body = {"format": FORMAT, "version": VERSION, **asdict(replace(manifest, tensors={}))}
    body["tensors"] = tensors
    body["xxh3"] = _digest(body)
    path = directory / MANIFEST
    disk.write_new(partial_path(path), [_text(body)])
    disk.rename(partial_path(path), path)
    disk.sync_names(directory)


def read_manifest(directory: Path, disk: Disk) -> Manifest:
    """Read and verify a manifest.

    Raises:
        CorruptError: it is missing, not valid JSON, of another format, fails its own hash, or is
            not byte for byte as it was written.
        ConfigError: it is intact and of another version of the format.
        LostError: the file server is gone.
    """
    path = directory / MANIFEST
    try:
        raw = _read(path, disk)
        body = json.loads(raw)
        # `1E-05` means what `1e-05` means and has its hash; it is damage all the same.
        intact = body["format"] == FORMAT and raw == _text(body)
        recorded, version = body.pop("xxh3"), body["version"]
        intact = intact and recorded == _digest(body)
    except FileNotFoundError:
        raise CorruptError(
            f"{directory}: no {MANIFEST}, so this is no finished checkpoint; name another"
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact, version = False, VERSION
    if not intact:
        raise CorruptError(f"{path}: damaged; use an older checkpoint")
    if version != VERSION:
        raise ConfigError(
            f"{path}: format version {version}, this megallama reads {VERSION}; use the version of "
            "megallama that wrote it, or another run.name to start anew"
        )
    return _manifest(path, body)


def unreadable(path: Path, error: OSError) -> CorruptError | LostError:
    """What a refused read means: the file is damaged, or its server is away for now.

    EIO is damage here: a bad sector answers so every time, and an older checkpoint may be read.
    """
    reason = error.strerror or error
    if error.errno in LOST and error.errno != errno.EIO:
        return LostError(f"cannot read {path}: {reason}; try again")
    return CorruptError(f"{path}: {reason}; use an older checkpoint")


def _read(path: Path, disk: Disk) -> bytes:
    with disk.reading(path) as file:
        size = disk.size(file)
        if size > MOST_BYTES:
            raise ValueError(f"{size} bytes")
        raw = bytearray(size)
        if disk.read_into(file, memoryview(raw), 0) != size:
            raise ValueError("cut while it was read")
    return bytes(raw)


def _manifest(path: Path, body: dict[str, Any]) -> Manifest:
    """From a body whose hash is right, which whoever crafts one can see to."""
    try:
        tensors = {n: Entry(e["dtype"], tuple(e["shape"])) for n, e in body["tensors"].items()}
        files = tuple(RankFile(**file) for file in body["files"])
        manifest = Manifest(
            body["state"], body["config"], body["tokenizer_hash"], body["sources"], tensors, files
        )
        right = _has_types(manifest)
    except (ValueError, KeyError, TypeError, AttributeError):
        right = False
    if not right:
        raise CorruptError(f"{path}: no manifest of a run, a value cannot be; name another")
    for file in files:
        if not FILE_NAME.fullmatch(file.name):  # none of ours: it may point elsewhere
            raise CorruptError(f"{path}: {file.name!r} is no name of a rank's file; name another")
    return manifest


def _has_types(manifest: Manifest) -> bool:
    """Whether every value is of its type and range. Raises where one is far from it."""
    entries, files = manifest.tensors.values(), manifest.files
    counts = [n for entry in entries for n in entry.shape]
    counts += [n for file in files for n in (file.bytes, file.header_bytes)]
    return (
        all(type(n) is int and 0 < n < 2**63 for n in counts)
        and all(entry.dtype in DTYPES and prod(entry.shape) < 2**60 for entry in entries)
        and all(0 < len(entry.shape) <= MOST_DIMS for entry in entries)
        and all(file.header_bytes <= min(file.bytes, MOST_HEADER) for file in files)
        and all(0 <= int(file.holds, 16) < 1 << len(entries) for file in files)
        and len({file.name for file in files}) == len(files)
        and all(isinstance(file.name, str) and len(file.name) < 256 for file in files)
        and all(isinstance(part, dict) for part in (manifest.config, *manifest.config.values()))
        and all(type(value) in (int, float, str, list) for value in manifest.state.values())
        and all(type(value) is str for value in manifest.sources.values())
        and (manifest.tokenizer_hash is None or type(manifest.tokenizer_hash) is str)
    )


def _text(body: dict[str, Any]) -> bytes:
    return json.dumps(body, indent=1).encode()


def _digest(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
