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
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from megallama.checkpoint import rank_file
from megallama.checkpoint.coverage import Tiling
from megallama.checkpoint.manifest import Manifest
from megallama.checkpoint.rank_file import Rectangle
from megallama.checkpoint.store import (
    Checkpoint,
    Want,
    begin_checkpoint,
    checkpoint_path,
    commit_checkpoint,
    committed_checkpoints,
    prune_checkpoints,
    write_rank,
)
from megallama.errors import ConfigError, CorruptError, LostError, UserError
from megallama.files import Disk

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
    assert replace(manifest, tensors={}, files=()) == FACTS
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


def test_manifest_and_header_say_where_every_slice_lies(saved: Path) -> None:
    """Read here with nothing of the package but the names of the keys."""
    manifest = json.loads((saved / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("megallama-checkpoint", 2)
    assert manifest["state"] == STATE
    assert manifest["config"] == CONFIG
    assert manifest["tokenizer_hash"] == "f" * 32
    (file,) = manifest["files"]
    whole = (saved / TENSORS).read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    assert (file["name"], file["bytes"], file["header_bytes"]) == (TENSORS, len(whole), begin)
    assert file["xxh3"] == xxhash.xxh3_128_hexdigest(whole[:begin])
    assert file["holds"] == "7"
    header = json.loads(whole[8:begin])
    table = json.loads(header.pop("__metadata__")["megallama"])
    expected, covered = some_tensors(), 0
    assert manifest["tensors"].keys() == header.keys() == table.keys() == expected.keys()
    for name, entry in manifest["tensors"].items():
        tensor, place = expected[name], table[name]
        word = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16"}[tensor.dtype]
        assert (entry["dtype"], entry["shape"]) == (word, list(tensor.shape))
        assert (place["start"], place["shape"]) == ([0] * tensor.dim(), list(tensor.shape))
        first, last = header[name]["data_offsets"]
        raw = whole[begin + first : begin + last]
        assert raw == tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert place["xxh3"] == [xxhash.xxh3_64_hexdigest(raw)]
        covered += len(raw)
    assert len(whole) == begin + covered
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
    for at, mask in flips(header):
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
    for name in Checkpoint(saved).manifest.tensors:
        (piece,) = Checkpoint(saved).manifest.tensors[name].slices
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
    with pytest.raises(CorruptError, match=r"rank-00000\.safetensors: its header or size"):
        verify(saved)


def rewrite(directory: Path, **changes: Any) -> None:
    """Change keys of a manifest, and its hash with them."""
    path = directory / "manifest.json"
    body = json.loads(path.read_text()) | changes
    del body["xxh3"]
    body["xxh3"] = xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
    path.write_text(json.dumps(body, indent=1))


@pytest.mark.parametrize("version", [1, 99])
def test_another_format_version_says_so_and_is_no_damage(saved: Path, version: int) -> None:
    """Damage would be passed over for an older checkpoint."""
    rewrite(saved, version=version)
    with pytest.raises(ConfigError, match=f"format version {version}, .*reads 2") as caught:
        Checkpoint(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../step-00000006/rank-00000.safetensors", "/etc/passwd", "rank-0.safetensors\n"]
)
def test_a_manifest_does_not_point_out_of_its_directory(
    saved: Path, tmp_path: Path, name: str
) -> None:
    save(checkpoint_path(tmp_path, 6))
    (file,) = json.loads((saved / "manifest.json").read_text())["files"]
    rewrite(saved, files=[file | {"name": name}])
    with pytest.raises(CorruptError, match="no name of a rank's file"):
        Checkpoint(saved)


@pytest.mark.parametrize("name", ["manifest.json", TENSORS])
def test_links_and_pipes_are_refused(saved: Path, tmp_path: Path, name: str) -> None:
    """A pipe is not waited for."""
    other = save(checkpoint_path(tmp_path, 6))
    (saved / name).unlink()
    (saved / name).symlink_to(other / name)
    with pytest.raises(CorruptError, match=name):
        verify(saved)
    (saved / name).unlink()
    os.mkfifo(saved / name)
    with pytest.raises(CorruptError, match=f"{name}: not a plain file"):
        verify(saved)
    save(saved)
    assert intact(saved)


def test_nested_json_is_damage(saved: Path) -> None:
    (saved / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(CorruptError, match="damaged"):
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


@pytest.mark.parametrize("name", ["listdir", "stat"])
@pytest.mark.parametrize("code, kind", [(errno.EACCES, ConfigError), (errno.ESTALE, LostError)])
def test_what_cannot_be_listed_is_not_taken_for_none(
    saved: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int, kind: type[UserError]
) -> None:
    """A run would begin anew, and write over what there is."""

    def refuse(*path: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, name, refuse)
    with pytest.raises(kind) as caught:
        committed_checkpoints(saved.parent)
    monkeypatch.undo()
    assert str(caught.value) == f"cannot list {saved.parent}: {os.strerror(code)}"
    assert committed_checkpoints(saved.parent) == [saved]
    assert committed_checkpoints(saved.parent / "nowhere") == []


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
    "refused, call", [*(("fsync", call) for call in (1, 2, 3, 4)), ("replace", 1), ("write", 3)]
)
def test_a_refusing_disk_leaves_the_checkpoint_before(
    saved: Path, monkeypatch: pytest.MonkeyPatch, refused: str, call: int
) -> None:
    """Of the run's directory, the file, its directory, the manifest; the rename that commits it."""
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
    checkpoint = Checkpoint(directory)
    assert checkpoint.manifest.tensors["master/w"].shape == (4, 6)
    assert {
        piece.file: piece.start for piece in checkpoint.manifest.tensors["master/w"].slices
    } == dict(zip(sorted(files), [(0, 0), (0, 3), (2, 0), (2, 3)], strict=True))
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


@pytest.mark.parametrize(
    "starts, words",
    [([0], "2 elements are in no slice"), ([0, 1, 2], "elements are in two slices")],
)
def test_what_does_not_hold_every_element_once_is_not_committed(
    tmp_path: Path, starts: list[int], words: str
) -> None:
    """A rank's text never reached the commit, or two ranks believe that they own the same."""
    directory = checkpoint_path(tmp_path, 1)
    begin_checkpoint(directory)
    texts = [
        write_rank(directory, rank, [Rectangle("master/n", (4,), (start,), torch.ones(2))])
        for rank, start in enumerate(starts)
    ]
    with pytest.raises(CorruptError, match=f"tensor 'master/n': {words}"):
        commit_checkpoint(directory, texts, FACTS)
    assert committed_checkpoints(tmp_path) == []


def test_ranks_that_do_not_agree_on_a_tensor_are_not_committed(tmp_path: Path) -> None:
    directory = checkpoint_path(tmp_path, 1)
    begin_checkpoint(directory)
    halves = [torch.ones(2), torch.ones(2, dtype=torch.float64)]
    texts = [
        write_rank(directory, rank, [Rectangle("master/n", (4,), (2 * rank,), half)])
        for rank, half in enumerate(halves)
    ]
    with pytest.raises(CorruptError, match=r"rank-00001\.safetensors: tensor 'master/n'"):
        commit_checkpoint(directory, texts, FACTS)


def test_a_tensor_larger_than_a_block_is_read_and_verified_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads a few rows reads, and finds damage in, the blocks that have them."""
    monkeypatch.setattr(rank_file, "BLOCK_BYTES", 100)
    whole = torch.randn(23, 6)  # 4 rows a block, the last of 3
    directory = save_whole(checkpoint_path(tmp_path, 1), {"master/w": whole})
    monkeypatch.undo()
    pieces = Checkpoint(directory).manifest.tensors["master/w"].slices
    assert [(p.start, p.shape) for p in pieces] == [
        ((row, 0), (min(4, 23 - row), 6)) for row in range(0, 23, 4)
    ]
    path = directory / TENSORS
    damaged = bytearray(path.read_bytes())
    damaged[pieces[2].offset + 95] ^= 1
    path.write_bytes(damaged)
    checkpoint = Checkpoint(directory)
    for first in range(23):
        for last in range(first + 1, 24):
            region = (slice(first, last), slice(1, 5))
            if first < 12 and last > 8:
                with pytest.raises(CorruptError, match="'master/w' is damaged"):
                    checkpoint.read("master/w", region)
            else:
                assert checkpoint.read("master/w", region).equal(whole[region])


class Counting(Disk):
    """Which files were opened to be read."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    @contextmanager
    def reading(self, path: Path) -> Iterator[int]:
        self.opened.append(path.name)
        with super().reading(path) as descriptor:
            yield descriptor


@pytest.mark.parametrize("rank", QUARTERS)
def test_a_rank_that_reads_what_it_wrote_opens_its_own_file(
    quartered: tuple[Path, Tensor], rank: int
) -> None:
    directory, whole = quartered
    disk = Counting()
    checkpoint = Checkpoint(directory, disk)
    target = torch.zeros(2, 3)
    checkpoint.fill([Want("master/w", QUARTERS[rank], target)], near=rank)
    assert target.equal(whole[QUARTERS[rank]])
    assert disk.opened == ["manifest.json", f"rank-{rank:05d}.safetensors"]


def test_files_without_a_wanted_tensor_are_not_opened(tmp_path: Path) -> None:
    directory = checkpoint_path(tmp_path, 1)
    names = ["a", "b", "c"]
    save_ranks(directory, [[Rectangle(n, (2,), (0,), torch.ones(2))] for n in names])
    disk = Counting()
    assert Checkpoint(directory, disk).read("b").equal(torch.ones(2))
    assert disk.opened == ["manifest.json", "rank-00001.safetensors"]


def test_a_file_that_is_cut_while_it_is_read_is_damage(saved: Path) -> None:
    """Not a SIGBUS, which would take the process."""
    checkpoint = Checkpoint(saved)
    checkpoint.read("master/norm.weight")
    os.truncate(saved / TENSORS, 100)
    with pytest.raises(CorruptError, match="rank-00000"):
        checkpoint.read("master/norm.weight")


def test_kept_for_ever_are_the_multiples(tmp_path: Path) -> None:
    for step in range(2, 15, 2):
        save(checkpoint_path(tmp_path, step))
        prune_checkpoints(tmp_path, 2, checkpoint_path(tmp_path, step), keep_every=6)
    steps = [int(path.name[5:]) for path in committed_checkpoints(tmp_path)]
    assert steps == [6, 12, 14]


def test_a_save_that_cannot_fit_is_not_begun(saved: Path) -> None:
    class Full(Disk):
        def free_bytes(self, directory: Path) -> int:
            return 2**30

    after = checkpoint_path(saved.parent, 6)
    with pytest.raises(ConfigError, match=r"takes 2\.00 GiB and the disk has 1\.00 GiB; free"):
        begin_checkpoint(after, 2**31, Full())
    assert not after.exists()
    begin_checkpoint(after, 2**30, Full())
    assert intact(saved)


def test_what_the_disk_has_otherwise_is_found_before_the_commit(tmp_path: Path) -> None:
    class Liar(Disk):
        """One byte of what is written comes to the disk as another."""

        def append(self, descriptor: int, data: memoryview) -> None:
            if len(data) == 8 * 5:
                data = memoryview(bytes(data[:-1]) + bytes([data[-1] ^ 1]))
            super().append(descriptor, data)

    directory = checkpoint_path(tmp_path, 1)
    begin_checkpoint(directory)
    mine = [Rectangle(n, tuple(t.shape), (0,) * t.dim(), t) for n, t in some_tensors().items()]
    with pytest.raises(CorruptError, match=r"tensor 'exp_avg/norm\.weight' is damaged"):
        write_rank(directory, 0, mine, Liar())


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_tilings_are_told_from_what_is_none(data: st.DataObject) -> None:
    """Against counting elements."""
    shape = tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    sides = [[(a, b) for a in range(size) for b in range(a + 1, size + 1)] for size in shape]
    drawn = data.draw(st.lists(st.tuples(*map(st.sampled_from, sides)), max_size=4))
    if data.draw(st.booleans()):  # mostly there are gaps: fill them
        drawn += [
            tuple((i, i + 1) for i in cell)
            for cell in product(*map(range, shape))
            if not any(
                all(a <= i < b for i, (a, b) in zip(cell, box, strict=True)) for box in drawn
            )
        ]
    count = np.zeros(shape, int)
    for box in drawn:
        count[tuple(slice(a, b) for a, b in box)] += 1
    tiling = Tiling(shape)
    for box in drawn:
        tiling.add(tuple(a for a, _ in box), tuple(b - a for a, b in box))
    assert (tiling.fault() == "") == bool((count == 1).all())
