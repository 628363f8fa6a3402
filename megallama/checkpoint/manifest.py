"""The manifest: what a checkpoint holds, independent of the layout that wrote it.

`manifest.json` is written last and by rename, so a directory that has one is complete. It names
every global tensor with its dtype and shape, and every slice of it with its file, byte range and
xxh3, plus the trainer's state, the config and the tokenizer's hash. Its own hash is its last key.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from megallama.errors import CorruptError
from megallama.files import write_atomic

MANIFEST = "manifest.json"
FORMAT = "megallama-checkpoint"
VERSION = 1


@dataclass(frozen=True)
class Slice:
    """A rectangle of a global tensor: where it begins, its shape, and where its bytes lie."""

    file: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int
    bytes: int
    xxh3: str


@dataclass(frozen=True)
class Entry:
    """A global tensor. `dtype` is safetensors' word for it (F32, BF16, …)."""

    dtype: str
    shape: tuple[int, ...]
    slices: tuple[Slice, ...]


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


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Commit a checkpoint whose files are already on the disk."""
    body = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    body["xxh3"] = _digest(body)
    write_atomic(directory / MANIFEST, _text(body))


def read_manifest(directory: Path) -> Manifest:
    """Read and verify a manifest.

    Raises:
        CorruptError: it is missing, not valid JSON, of another format, fails its own hash, or is
            not byte for byte as it was written.
    """
    path = directory / MANIFEST
    try:
        raw = path.read_bytes()
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
        raise CorruptError(f"{path}: {error.strerror}; use an older checkpoint") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        intact, version = False, VERSION
    if not intact:
        raise CorruptError(f"{path}: damaged; use an older checkpoint")
    if version != VERSION:
        raise CorruptError(f"{path}: format version {version}, this megallama reads {VERSION}")
    tensors = {name: entry_from_json(entry) for name, entry in body["tensors"].items()}
    return Manifest(body["state"], body["config"], body["tokenizer_hash"], body["sources"], tensors)


def entry_from_json(entry: dict[str, Any]) -> Entry:
    """An entry from its fields as JSON has them, with lists for tuples."""
    slices = tuple(
        Slice(**{**s, "start": tuple(s["start"]), "shape": tuple(s["shape"])})
        for s in entry["slices"]
    )
    return Entry(entry["dtype"], tuple(entry["shape"]), slices)


def _text(body: dict[str, Any]) -> bytes:
    return json.dumps(body, indent=1).encode()


def _digest(body: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
