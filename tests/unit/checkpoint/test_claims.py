"""What ranks say of their files is what the headers hold, and rank 0 parses no header for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megallama.checkpoint import rank_file
from megallama.checkpoint.claims import join, pack, unpack
from megallama.checkpoint.manifest import Manifest, RankFile
from megallama.checkpoint.rank_file import Rectangle, Table
from megallama.checkpoint.store import (
    Checkpoint,
    begin_checkpoint,
    commit_checkpoint,
    write_rank,
)
from megallama.errors import CorruptError

MATRIX, VECTOR = torch.arange(24.0).view(6, 4), torch.arange(5, dtype=torch.float64)


def rectangles(rank: int) -> list[Rectangle]:
    """Of rank 0 and 1 a half of the matrix each, of 2 the vector."""
    if rank == 2:
        return [Rectangle("v", (5,), (0,), VECTOR)]
    return [Rectangle("m", (6, 4), (3 * rank, 0), MATRIX[3 * rank : 3 * rank + 3])]


def write(directory: Path) -> list[str]:
    begin_checkpoint(directory)
    return [write_rank(directory, rank, rectangles(rank)) for rank in range(3)]


def test_a_claim_is_what_the_header_says(tmp_path: Path) -> None:
    texts = write(tmp_path / "step-00000001")
    claims = [unpack(text) for text in texts]
    for claim in claims:
        raw = (tmp_path / "step-00000001" / claim.file.name).read_bytes()[: claim.file.header_bytes]
        header = json.loads(raw[8:])
        more = json.loads(header.pop("__metadata__")["megallama"])
        edges = [n for name in header for n in (*more[name]["start"], *header[name]["shape"])]
        assert claim.edges.tolist() == edges
    assert claims[0].tensors == claims[1].tensors != claims[2].tensors
    tensors, tilings, names = join(tmp_path, claims)
    assert {name: (e.dtype, e.shape) for name, e in tensors.items()} == {
        "m": ("F32", (6, 4)),
        "v": ("F64", (5,)),
    }
    assert names == {claims[0].tensors: ["m"], claims[2].tensors: ["v"]}
    assert [tiling.fault() for tiling in tilings.values()] == ["", ""]
    assert "12 elements" in join(tmp_path, claims[1:])[1]["m"].fault()
    assert "two slices" in join(tmp_path, [*claims, claims[0]])[1]["m"].fault()


def test_a_claim_is_small_where_there_are_many_tensors() -> None:
    """A store holds one of every rank: 2,048 of 1,700 rectangles. Headers have 250 bytes each."""
    header = {
        "__metadata__": {
            "megallama": json.dumps(
                {f"t{n}": {"shape": [4096, 64], "start": [4, 0], "rows": 4, "xxh3": [f"{n:016x}"]}
                 for n in range(1700)}
            )
        },
        **{f"t{n}": {"dtype": "F32", "shape": [4, 64], "data_offsets": [1024 * n, 1024 * (n + 1)]}
           for n in range(1700)},
    }  # fmt: skip
    table = Table(Path("x"), bytearray(8) + json.dumps(header).encode(), 1 << 30)
    assert len(pack(RankFile("rank-00000.safetensors", 1, 1, ""), table)) < 10 * 1700


def test_the_commit_parses_no_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "step-00000001"
    texts = write(directory)
    with monkeypatch.context() as patch:
        patch.setattr(rank_file, "Table", None)
        commit_checkpoint(directory, texts, Manifest({}, {}, None, {}))
    checkpoint = Checkpoint(directory)
    checkpoint.verify()
    assert checkpoint.read("m").equal(MATRIX)
    assert checkpoint.read("v").equal(VECTOR)


@pytest.mark.parametrize("at", [3, 100, -1])
def test_a_file_that_another_rank_damaged_meanwhile_is_not_committed(
    tmp_path: Path, at: int
) -> None:
    directory = tmp_path / "step-00000001"
    texts = write(directory)
    path = directory / "rank-00001.safetensors"
    raw = bytearray(path.read_bytes())
    if at < 0:
        del raw[-1]
    else:
        raw[at] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CorruptError, match=r"rank-00001\.safetensors: its header or size"):
        commit_checkpoint(directory, texts, Manifest({}, {}, None, {}))
    assert not (directory / "manifest.json").exists()
