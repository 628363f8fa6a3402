"""What a checkpoint directory holds, and that any damage to it is refused by name."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from megallama.checkpoint.manifest import Manifest
from megallama.checkpoint.store import (
    Checkpoint,
    Rectangle,
    begin_checkpoint,
    checkpoint_path,
    commit_checkpoint,
    committed_checkpoints,
    prune_checkpoints,
    write_rank,
)
from megallama.errors import ConfigError, CorruptError

STATE = {"step": 3, "samples": 12, "rate": 1e-05}
CONFIG = {"model": {"d_model": 16}, "run": {"name": "größe"}}
FACTS = Manifest(STATE, CONFIG, "f" * 32, {"web": "12 tokens, 00"})
TENSORS = "rank-00000.safetensors"


def some_tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "master/norm.weight": torch.randn(5, generator=generator),
        "master/layers.0.wo.weight": torch.randn(3, 4, generator=generator).bfloat16(),
        "exp_avg/norm.weight": torch.randn(5, generator=generator, dtype=torch.float64),
    }


def save_ranks(directory: Path, ranks: Sequence[Sequence[Rectangle]]) -> Path:
    """A checkpoint of what each rank has."""
    begin_checkpoint(directory)
    texts = [write_rank(directory, rank, mine) for rank, mine in enumerate(ranks)]
    commit_checkpoint(directory, texts, FACTS)
    return directory


def save_whole(directory: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A checkpoint of whole tensors, by one rank."""
    rectangles = [Rectangle(n, tuple(t.shape), (0,) * t.dim(), t) for n, t in tensors.items()]
    return save_ranks(directory, [rectangles])


def save(directory: Path, seed: int = 0) -> Path:
    return save_whole(directory, some_tensors(seed))


def read_all(directory: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(directory)
    return {name: checkpoint.read(name) for name in checkpoint.manifest.tensors}


def intact(directory: Path, seed: int = 0) -> bool:
    read, expected = read_all(directory), some_tensors(seed)
    return read.keys() == expected.keys() and all(read[n].equal(expected[n]) for n in read)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(checkpoint_path(tmp_path, 3))


def test_what_was_saved_comes_back(saved: Path) -> None:
    assert intact(saved)
    assert {n: t.dtype for n, t in read_all(saved).items()} == {
        n: t.dtype for n, t in some_tensors().items()
    }
    manifest = Checkpoint(saved).manifest
    assert replace(manifest, tensors={}) == FACTS
    Checkpoint(saved).verify()


def test_views_and_transposes_are_saved_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    parts = {"rows": whole[1:], "turned": whole.T}
    save_whole(tmp_path / "step-00000001", parts)
    for name, tensor in read_all(tmp_path / "step-00000001").items():
        assert tensor.equal(parts[name])


def test_safetensors_reads_the_tensor_file(saved: Path) -> None:
    expected = some_tensors()
    assert all(t.equal(expected[n]) for n, t in load_file(saved / TENSORS).items())
    with safe_open(saved / TENSORS, "pt") as file:
        assert set(file.keys()) == set(expected)


def test_the_manifest_says_where_every_slice_lies(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["format"] == "megallama-checkpoint"
    assert manifest["state"] == STATE
    assert manifest["config"] == CONFIG
    assert manifest["tokenizer_hash"] == "f" * 32
    expected, covered = some_tensors(), 0
    assert manifest["tensors"].keys() == expected.keys()
    for name, entry in manifest["tensors"].items():
        tensor = expected[name]
        word = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16"}[tensor.dtype]
        assert (entry["dtype"], entry["shape"]) == (word, list(tensor.shape))
        (piece,) = entry["slices"]
        assert (piece["start"], piece["shape"]) == ([0] * tensor.dim(), list(tensor.shape))
        raw = (saved / piece["file"]).read_bytes()[piece["offset"] :][: piece["bytes"]]
        assert raw == tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert piece["xxh3"] == xxhash.xxh3_64_hexdigest(raw)
        covered += len(raw)
    header = int.from_bytes((saved / TENSORS).read_bytes()[:8], "little")
    assert (saved / TENSORS).stat().st_size == 8 + header + covered
    assert {p.name for p in saved.iterdir()} == {"manifest.json", TENSORS}


def verify(directory: Path) -> None:
    Checkpoint(directory).verify()


def flips(size: int, bits: int = 1) -> Iterator[tuple[int, int]]:
    """`bits` of the 8 bits of each of `size` bytes."""
    generator = random.Random(size)
    for at in range(size):
        for bit in generator.sample(range(8), bits):
            yield at, 1 << bit


def test_a_flipped_bit_of_the_manifest_is_refused(saved: Path) -> None:
    path = saved / "manifest.json"
    whole = path.read_bytes()
    for at, mask in flips(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= mask
        path.write_bytes(damaged)
        with pytest.raises(CorruptError, match=r"manifest\.json: damaged"):
            Checkpoint(saved)
    path.write_bytes(whole)
    verify(saved)


def test_a_manifest_that_means_the_same_and_is_written_otherwise_is_refused(saved: Path) -> None:
    path = saved / "manifest.json"
    whole = path.read_bytes()
    assert b"1e-05" in whole
    for other in (whole.replace(b"1e-05", b"1E-05"), whole + b"\n"):
        path.write_bytes(other)
        with pytest.raises(CorruptError, match="damaged"):
            Checkpoint(saved)


def test_a_flipped_bit_of_the_tensor_files_header_is_refused(saved: Path) -> None:
    path = saved / TENSORS
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for at, mask in flips(header, bits=3):
        damaged = bytearray(whole)
        damaged[at] ^= mask
        path.write_bytes(damaged)
        with pytest.raises(CorruptError, match=r"rank-00000\.safetensors: its header or size"):
            verify(saved)
    path.write_bytes(whole)
    verify(saved)


def test_a_flipped_bit_of_a_tensor_is_refused_by_its_name(saved: Path) -> None:
    path = saved / TENSORS
    whole = path.read_bytes()
    for name, entry in Checkpoint(saved).manifest.tensors.items():
        (piece,) = entry.slices
        for at, mask in flips(piece.bytes):
            damaged = bytearray(whole)
            damaged[piece.offset + at] ^= mask
            path.write_bytes(damaged)
            checkpoint = Checkpoint(saved)
            for refused in (checkpoint.verify, lambda c=checkpoint, n=name: c.read(n)):
                with pytest.raises(CorruptError) as caught:
                    refused()
                assert str(path) in str(caught.value)
                assert repr(name) in str(caught.value)
    path.write_bytes(whole)
    verify(saved)


@pytest.mark.parametrize("name", ["manifest.json", TENSORS])
def test_a_file_cut_short_longer_or_gone_is_refused(saved: Path, name: str) -> None:
    path = saved / name
    whole = path.read_bytes()
    for content in (b"", whole[:4], whole[: len(whole) // 2], whole[:-1], whole + b"\0"):
        path.write_bytes(content)
        with pytest.raises(CorruptError, match=name):
            verify(saved)
    path.unlink()
    with pytest.raises(CorruptError, match=name):
        verify(saved)
    path.mkdir()  # something that is no file at all
    with pytest.raises(CorruptError, match=name):
        verify(saved)


@pytest.mark.parametrize("name", ["manifest.json", TENSORS])
def test_files_of_two_checkpoints_do_not_mix(saved: Path, tmp_path: Path, name: str) -> None:
    other = save(checkpoint_path(tmp_path, 6), seed=1)
    shutil.copy(other / name, saved / name)
    with pytest.raises(CorruptError, match=r"rank-00000\.safetensors: tensor '"):
        verify(saved)


def test_another_format_version_says_so(saved: Path) -> None:
    path = saved / "manifest.json"
    body = json.loads(path.read_text())
    del body["xxh3"]
    body["version"] = 99
    body["xxh3"] = xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
    path.write_text(json.dumps(body, indent=1))
    with pytest.raises(CorruptError, match="format version 99"):
        Checkpoint(saved)


def test_what_is_not_there_is_named(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match=r"holds no tensor 'exp_avg/x'"):
        Checkpoint(saved).read("exp_avg/x")
    with pytest.raises(ConfigError, match=r"nowhere: no such checkpoint directory"):
        Checkpoint(tmp_path / "nowhere")


def test_an_unfinished_directory_is_no_checkpoint_and_is_written_anew(saved: Path) -> None:
    (saved / "manifest.json").unlink()
    (saved / "rank-00007.safetensors").write_bytes(b"of another layout")
    assert committed_checkpoints(saved.parent) == []
    with pytest.raises(CorruptError, match=r"no manifest\.json"):
        Checkpoint(saved)
    save(saved, seed=2)
    assert intact(saved, seed=2)
    assert committed_checkpoints(saved.parent) == [saved]
    assert not (saved / "rank-00007.safetensors").exists()


def test_only_directories_of_the_right_name_are_checkpoints(saved: Path) -> None:
    shutil.copytree(saved, saved.with_name("step-00000003.copy"))
    assert committed_checkpoints(saved.parent) == [saved]
    assert committed_checkpoints(saved.parent / "nowhere") == []


def test_pruning_keeps_the_newest_and_spares_what_is_newer(tmp_path: Path) -> None:
    paths = {step: save(checkpoint_path(tmp_path, step)) for step in (2, 4, 6, 8)}
    interrupted = checkpoint_path(tmp_path, 5)
    shutil.copytree(paths[4], interrupted)
    (interrupted / "manifest.json").unlink()
    prune_checkpoints(tmp_path, keep=2, newest=paths[6])
    # 8 was there before 6 was saved: passed over as damaged, and overwritten when it is reached.
    assert committed_checkpoints(tmp_path) == [paths[4], paths[6], paths[8]]
    assert not paths[2].exists()
    assert not interrupted.exists()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(saved: Path) -> None:
    after = checkpoint_path(saved.parent, 6)
    for size in (0, 100, 600):  # in the tensor file's header, in its tensors, in the manifest
        with pytest.raises(ConfigError, match="cannot write") as caught, largest_file(size):
            save(after, seed=1)
        assert str(after) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert committed_checkpoints(saved.parent) == [saved]
        assert intact(saved)
    save(after, seed=1)
    assert intact(after, seed=1)


@pytest.mark.parametrize(
    "refused, call", [*(("fsync", call) for call in (1, 2, 3, 4)), ("replace", 1)]
)
def test_a_refusing_disk_leaves_the_checkpoint_before(
    saved: Path, monkeypatch: pytest.MonkeyPatch, refused: str, call: int
) -> None:
    """Of the file, its directory, the run's, the manifest; and the rename that commits it."""
    real, calls = getattr(os, refused), 0

    def sometimes(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    after = checkpoint_path(saved.parent, 6)
    with monkeypatch.context() as patch:
        patch.setattr(os, refused, sometimes)
        with pytest.raises(ConfigError, match=r"cannot write .*No space left on device") as caught:
            save(after, seed=1)
    assert "\n" not in str(caught.value)
    assert calls == call
    assert committed_checkpoints(saved.parent) == [saved]
    assert intact(saved)
    save(after, seed=1)
    assert intact(after, seed=1)


@st.composite
def grids_of_rectangles(draw: st.DrawFn) -> tuple[tuple[int, int], list[int], list[int]]:
    """A shape, and where its rows and its columns are cut."""
    shape = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    cuts = [sorted({0, size, *draw(st.lists(st.integers(1, size), max_size=3))}) for size in shape]
    return shape, cuts[0], cuts[1]


@given(grid=grids_of_rectangles(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_region_of_what_several_ranks_wrote_is_the_slice_of_the_whole(
    grid: tuple[tuple[int, int], list[int], list[int]], data: st.DataObject
) -> None:
    """However the tensors are cut and whichever rank has which rectangle: bit for bit."""
    shape, rows, columns = grid
    matrix, vector = torch.randn(shape), torch.randn(shape[0], dtype=torch.float64)
    places = [
        (slice(top, bottom), slice(left, right))
        for top, bottom in pairwise(rows)
        for left, right in pairwise(columns)
    ]
    order = data.draw(st.permutations(range(len(places))))
    ranks: list[list[Rectangle]] = [[] for _ in places]
    for rank, number in enumerate(order):
        region = places[number]
        start = tuple(s.start for s in region)
        ranks[rank].append(Rectangle("master/w.weight", shape, start, matrix[region]))
        if number < len(rows) - 1:
            part = slice(rows[number], rows[number + 1])
            ranks[rank].append(Rectangle("master/b.weight", shape[:1], (part.start,), vector[part]))
    with tempfile.TemporaryDirectory() as folder:
        directory = save_ranks(Path(folder) / "step-00000001", ranks)
        checkpoint = Checkpoint(directory)
        checkpoint.verify()
        assert checkpoint.read("master/w.weight").equal(matrix)
        assert checkpoint.read("master/b.weight").equal(vector)
        for _ in range(5):
            region = tuple(
                slice(*sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2)))) for size in shape
            )
            assert checkpoint.read("master/w.weight", region).equal(matrix[region])
            assert checkpoint.read("master/b.weight", region[:1]).equal(vector[region[0]])


QUARTERS = {
    rank: (slice(2 * (rank // 2), 2 * (rank // 2) + 2), slice(3 * (rank % 2), 3 * (rank % 2) + 3))
    for rank in range(4)
}


@pytest.fixture
def quartered(tmp_path: Path) -> tuple[Path, Tensor]:
    """A (4, 6) tensor of which four ranks wrote a quarter each, beside a rank without any."""
    whole = torch.arange(24.0).view(4, 6)
    ranks = [
        [Rectangle("master/w", (4, 6), (rows.start, columns.start), whole[rows, columns])]
        for rows, columns in QUARTERS.values()
    ]
    return save_ranks(checkpoint_path(tmp_path, 1), [*ranks, []]), whole


def test_ranks_write_a_file_each_and_one_that_owns_nothing_none(
    quartered: tuple[Path, Tensor],
) -> None:
    directory, whole = quartered
    files = {f"rank-{rank:05d}.safetensors" for rank in range(4)}
    assert {path.name for path in directory.iterdir()} == {"manifest.json", *files}
    (entry,) = Checkpoint(directory).manifest.tensors.values()
    assert entry.shape == (4, 6)
    assert {piece.file: piece.start for piece in entry.slices} == dict(
        zip(sorted(files), [(0, 0), (0, 3), (2, 0), (2, 3)], strict=True)
    )
    for rank, region in QUARTERS.items():
        tensors = load_file(directory / f"rank-{rank:05d}.safetensors")
        assert tensors["master/w"].equal(whole[region])


@pytest.mark.parametrize("damaged", QUARTERS)
def test_damage_is_refused_by_whoever_reads_a_region_that_it_touches(
    quartered: tuple[Path, Tensor], damaged: int
) -> None:
    """And by nobody else: a rank reads and checks the slices that it needs."""
    directory, whole = quartered
    path = directory / f"rank-{damaged:05d}.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 4
    path.write_bytes(raw)
    lower, right = damaged // 2, damaged % 2
    for rows, columns in product(((0, 1), (1, 3), (3, 4), (2, 2)), ((0, 2), (2, 5), (4, 6))):
        region = (slice(*rows), slice(*columns))
        touched = rows[0] < 2 * lower + 2 and rows[1] > 2 * lower and rows[0] < rows[1]
        touched = touched and columns[0] < 3 * right + 3 and columns[1] > 3 * right
        checkpoint = Checkpoint(directory)
        if touched:
            with pytest.raises(CorruptError, match=rf"{path.name}: tensor 'master/w' is damaged"):
                checkpoint.read("master/w", region)
        else:
            assert checkpoint.read("master/w", region).equal(whole[region])
    with pytest.raises(CorruptError, match=path.name):
        Checkpoint(directory).verify()


def test_a_rank_s_file_that_is_gone_is_refused(quartered: tuple[Path, Tensor]) -> None:
    directory, _ = quartered
    (directory / "rank-00002.safetensors").unlink()
    with pytest.raises(CorruptError, match=r"rank-00002\.safetensors: No such file"):
        Checkpoint(directory).verify()


def test_until_it_is_committed_there_is_no_checkpoint(tmp_path: Path) -> None:
    """Every rank has written and synced its file, and a kill now leaves the one before."""
    before, after = save(checkpoint_path(tmp_path, 1)), checkpoint_path(tmp_path, 2)
    begin_checkpoint(after)
    texts = [
        write_rank(after, rank, [Rectangle("master/n", (4,), (2 * rank,), torch.ones(2))])
        for rank in range(2)
    ]
    assert committed_checkpoints(tmp_path) == [before]
    commit_checkpoint(after, texts, FACTS)
    assert committed_checkpoints(tmp_path) == [before, after]
    assert Checkpoint(after).read("master/n").equal(torch.ones(4))


def test_a_region_that_no_slice_covers_is_refused(tmp_path: Path) -> None:
    """Its manifest is intact, but a rank's text never reached the commit."""
    directory = checkpoint_path(tmp_path, 1)
    begin_checkpoint(directory)
    text = write_rank(directory, 0, [Rectangle("master/n", (4,), (0,), torch.ones(2))])
    commit_checkpoint(directory, [text], FACTS)
    with pytest.raises(CorruptError, match="master/n"):
        Checkpoint(directory).read("master/n")
