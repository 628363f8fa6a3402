"""Save and load a checkpoint directory, and find the ones that a run has.

Tensors go to safetensors files, one a rank, under `kind/name` (`master/norm.weight`); no pickle is
written or read. Every byte that is loaded is checked against its hash first.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

from megallama.checkpoint.manifest import (
    MANIFEST,
    Entry,
    Manifest,
    Slice,
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
    return sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))


def save_checkpoint(
    directory: Path,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer_hash: str | None,
) -> None:
    """Write a checkpoint; it exists once this returns and not before.

    A directory left unfinished by an earlier attempt is written anew.

    Raises:
        ConfigError: the disk refuses (no space, no permission); earlier checkpoints are untouched.
    """
    file = directory / "rank-00000.safetensors"
    with refuse_os_errors("write", directory):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, file)
        for path in (file, directory, directory.parent):
            sync_path(path)
        entries = _describe(file)
    write_manifest(directory, Manifest(dict(state), dict(config), tokenizer_hash, entries))


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` finished checkpoints, each one's manifest first."""
    for directory in committed_checkpoints(folder)[:-keep]:
        os.remove(directory / MANIFEST)
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

    def read(self, name: str) -> Tensor:
        """The whole global tensor, verified.

        Raises:
            CorruptError: it is not there, or a slice's bytes do not match their hash.
        """
        entry = self.manifest.tensors.get(name)
        if entry is None:
            raise CorruptError(f"{self.directory}: holds no tensor {name!r}; use another")
        whole = torch.empty(entry.shape, dtype=_DTYPES[entry.dtype])
        for piece in entry.slices:
            raw = self._bytes(name, piece)
            ranges = zip(piece.start, piece.shape, strict=True)
            target = whole[tuple(slice(start, start + size) for start, size in ranges)]
            target.copy_(torch.frombuffer(raw, dtype=whole.dtype).view(piece.shape))
        return whole

    def verify(self) -> None:
        """Read everything once; raises CorruptError at the first damage."""
        for name, entry in self.manifest.tensors.items():
            for piece in entry.slices:
                self._bytes(name, piece)

    def _bytes(self, name: str, piece: Slice) -> bytearray:
        path = self.directory / piece.file
        raw = bytearray(piece.bytes)
        try:
            with open(path, "rb") as file:
                file.seek(piece.offset)
                read = file.readinto(raw)
        except OSError as error:
            raise CorruptError(f"{path}: {error.strerror}; use an older checkpoint") from None
        if read != piece.bytes or xxhash.xxh3_64_hexdigest(raw) != piece.xxh3:
            raise CorruptError(f"{path}: tensor {name!r} is damaged; use an older checkpoint")
        return raw


def _describe(path: Path) -> dict[str, Entry]:
    """The entries of a file that holds whole tensors, hashed as they were written."""
    entries = {}
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
        header.pop("__metadata__", None)
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            offset, shape = 8 + header_bytes + begin, tuple(tensor["shape"])
            file.seek(offset)
            digest = xxhash.xxh3_64_hexdigest(file.read(end - begin))
            start = (0,) * len(shape)
            piece = Slice(path.name, start, shape, offset, end - begin, digest)
            entries[name] = Entry(tensor["dtype"], shape, (piece,))
    return entries
