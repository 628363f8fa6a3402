"""Directories as an attacker would hand them on: whole ones, and what may be done to them.

Hashes are no signatures: whoever crafts a file computes them anew, and so does `resign`.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from megallama.checkpoint import manifest as manifests
from tests.reference import Shape, huggingface, random_weights
from tests.unit.checkpoint.formats import save_checkpoint

SHAPE = Shape(d_model=16, layers=1, heads=2, kv_heads=2, ffn=20, vocab=30)
NAME = "master/norm.weight"


@dataclass(frozen=True)
class Bait:
    """`secret`: a file outside, whose text must come up nowhere. `executed`: a file that payloads
    make."""

    secret: Path
    executed: Path

    def payload(self) -> object:
        """An object whose unpickling runs a command."""
        return _Payload(self.executed)


class _Payload:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._path}",)


Attack = Callable[[Path, Bait], object]


def checkpoint(directory: Path) -> None:
    save_checkpoint(directory, SHAPE, random_weights(SHAPE))


def hugging_face(directory: Path) -> None:
    huggingface.build(SHAPE, random_weights(SHAPE), torch.float32).save_pretrained(directory)


def meta(directory: Path) -> None:
    directory.mkdir()
    params = {"dim": 16, "n_layers": 1, "n_heads": 2, "norm_eps": 1e-5, "multiple_of": 20}
    params |= {"ffn_dim_multiplier": 0.3}
    (directory / "params.json").write_text(json.dumps(params))
    torch.save(random_weights(SHAPE), directory / "consolidated.00.pth")


def resign(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and give it the hash that it then has."""
    path = directory / "manifest.json"
    body = json.loads(path.read_text())
    del body["xxh3"]
    change(body)
    body["xxh3"] = manifests._digest(body)
    path.write_bytes(manifests._text(body))


def rewrite(directory: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Change the header of a checkpoint's file, given as its two tables, and the manifest to it."""
    path = next(directory.glob("rank-*"))
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    tensors = json.loads(raw[8:end])
    more = json.loads(tensors.pop("__metadata__")["megallama"])
    change(tensors, more)
    text = json.dumps({"__metadata__": {"megallama": json.dumps(more)}, **tensors}).encode()
    put_header(directory, text, raw[end:])


def put_header(directory: Path, text: bytes, data: bytes) -> None:
    """Write a checkpoint's file with this header, and the manifest to it."""
    path = next(directory.glob("rank-*"))
    header = len(text).to_bytes(8, "little") + text
    path.write_bytes(header + data)
    size, digest = len(header) + len(data), xxhash.xxh3_128_hexdigest(header)
    facts = {"bytes": size, "header_bytes": len(header), "xxh3": digest}
    resign(directory, lambda body: body["files"][0].update(facts))


def set_key(*keys: str | int, value: object) -> Attack:
    """A value of the manifest, under some keys."""

    def change(body: Any) -> None:
        for key in keys[:-1]:
            body = body[key]
        body[keys[-1]] = value

    return lambda directory, _: resign(directory, change)


def set_held(key: str, value: object, table: int = 1) -> Attack:
    """A value of a tensor in the header of a checkpoint's file; table 0 is safetensors' own."""

    def change(*tables: dict[str, Any]) -> None:
        tables[table][NAME][key] = value

    return lambda directory, _: rewrite(directory, change)


def put(name: str, content: bytes | str) -> Attack:
    """A file's content."""
    raw = content.encode() if isinstance(content, str) else content
    return lambda directory, _: (directory / name).write_bytes(raw)


def edit(name: str, **values: object) -> Attack:
    """Keys of a JSON file."""

    def attack(directory: Path, _: Bait) -> None:
        path = directory / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return attack


def link(name: str) -> Attack:
    """A link to the secret in place of a file."""

    def attack(directory: Path, bait: Bait) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(bait.secret)

    return attack


def link_to_whole(name: str) -> Attack:
    """A link to a file outside that is as it should be."""

    def attack(directory: Path, _: Bait) -> None:
        outside = directory.parent / "beyond"
        (directory / name).rename(outside)
        (directory / name).symlink_to(outside)

    return attack


def pipe(name: str) -> Attack:
    """A pipe that nobody writes to in place of a file."""

    def attack(directory: Path, _: Bait) -> None:
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return attack


def device(name: str) -> Attack:
    """A link to an endless device in place of a file."""

    def attack(directory: Path, _: Bait) -> None:
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to("/dev/zero")

    return attack


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> Attack:
    """`model.safetensors` of this header (bytes: as they are), whose length may be another."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(text) if length is None else length)
    return put("model.safetensors", size + text + data)


def index(places: dict[str, Any]) -> Attack:
    """Hugging Face's index in place of the single file."""

    def attack(directory: Path, bait: Bait) -> None:
        (directory / "model.safetensors").rename(directory.parent / "beyond.safetensors")
        text = json.dumps({"weight_map": places}).replace("SECRET", str(bait.secret))
        (directory / "model.safetensors.index.json").write_text(text)

    return attack


def pickled(make: Callable[[Bait], object]) -> Attack:
    """A `.pth` that torch.save makes of an object."""

    def attack(directory: Path, bait: Bait) -> None:
        torch.save(make(bait), directory / "consolidated.00.pth")

    return attack


def bare_pickle(directory: Path, bait: Bait) -> None:
    (directory / "consolidated.00.pth").write_bytes(pickle.dumps(bait.payload()))


def archive(change: Callable[[zipfile.ZipFile, str, bytes], object]) -> Attack:
    """The `.pth` written anew, a member at a time, by `change`."""

    def attack(directory: Path, _: Bait) -> None:
        path = directory / "consolidated.00.pth"
        old = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
        with zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                change(new, name, old.read(name))

    return attack


def replaced(member: str, content: bytes, compression: int = zipfile.ZIP_STORED) -> Attack:
    """The `.pth` with another content of a member."""

    def change(new: zipfile.ZipFile, name: str, raw: bytes) -> None:
        if name.endswith(f"/{member}"):
            new.writestr(name, content, compression)
        else:
            new.writestr(name, raw)

    return archive(change)


def grown(attribute: str) -> Attack:
    """The `.pth` whose directory says that a member has 2 TiB."""

    def attack(directory: Path, _: Bait) -> None:
        path = directory / "consolidated.00.pth"
        with zipfile.ZipFile(path, "a") as whole:
            setattr(whole.infolist()[2], attribute, 2 << 40)
            whole.writestr("archive/more", b"")  # so that the directory is written anew

    return attack


def hooked(directory: Path, bait: Bait) -> None:
    """A pickle of calls that `weights_only` might let pass: only tensors may be built."""
    body = b"\x80\x02cos\nsystem\nX" + struct.pack("<I", len(f"touch {bait.executed}"))
    body += f"touch {bait.executed}".encode() + b"\x85R."
    replaced("data.pkl", body)(directory, bait)
