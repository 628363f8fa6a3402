"""What a rank says that its file holds, packed to go through the job's store.

A rank knows its own rectangles. Rank 0 that parsed every header to learn them took 37 s under the
interpreter's lock at 2,048 ranks, and its training thread stood still. As arrays they take a few
KiB a rank, and all rectangles of a tensor are checked at once.
"""

from __future__ import annotations

import json
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megallama.checkpoint.coverage import Tiling
from megallama.checkpoint.manifest import Entry, RankFile
from megallama.checkpoint.rank_file import Table
from megallama.errors import CorruptError


@dataclass(frozen=True)
class Claim:
    """One rank's file and its rectangles.

    `tensors`: packed JSON, [name, dtype, global shape] of each; ranks that hold parts of the same
    tensors have the same text. `edges`: int64, for each in that order where its rectangle begins
    and then its size.
    """

    file: RankFile
    tensors: str
    edges: npt.NDArray[np.int64]


def pack(file: RankFile, table: Table) -> str:
    """The text of a rank's claim."""
    held = {name: table[name] for name in table}
    tensors = json.dumps([[name, h.dtype, h.whole] for name, h in held.items()])
    edges = np.array([n for h in held.values() for n in (*h.start, *h.shape)], "<i8")
    body = {"tensors": _squeeze(tensors.encode()), "edges": _squeeze(edges.tobytes())}
    return json.dumps({"file": asdict(file), **body})


def unpack(text: str) -> Claim:
    """The claim of a text by `pack`."""
    body = json.loads(text)
    edges = np.frombuffer(_expand(body["edges"]), "<i8")
    return Claim(RankFile(**body["file"]), body["tensors"], edges)


def join(
    directory: Path, claims: Iterable[Claim]
) -> tuple[dict[str, Entry], dict[str, Tiling], dict[str, list[str]]]:
    """Every tensor and how it is tiled; and of every text `Claim.tensors` the names.

    Raises CorruptError where two ranks differ on the type or the shape of a tensor.
    """
    alike: dict[str, list[Claim]] = {}
    for claim in claims:
        alike.setdefault(claim.tensors, []).append(claim)
    tensors: dict[str, Entry] = {}
    tilings: dict[str, Tiling] = {}
    names: dict[str, list[str]] = {}
    for text, group in alike.items():
        rows = np.stack([claim.edges for claim in group])
        listed = json.loads(_expand(text))
        names[text] = [name for name, _, _ in listed]
        at = 0
        for name, dtype, shape in listed:
            entry = Entry(dtype, tuple(shape))
            if tensors.setdefault(name, entry) != entry:
                path = directory / group[0].file.name
                raise CorruptError(f"{path}: tensor {name!r} is {entry}, not {tensors[name]}")
            boxes = rows[:, at : at + 2 * len(shape)]
            tilings.setdefault(name, Tiling(entry.shape)).add_all(boxes)
            at += 2 * len(shape)
    return tensors, tilings, names


def _squeeze(raw: bytes) -> str:
    return b64encode(zlib.compress(raw, 1)).decode()


def _expand(text: str) -> bytes:
    return zlib.decompress(b64decode(text))
