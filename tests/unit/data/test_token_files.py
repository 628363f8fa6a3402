"""Token files, against Megatron's own code and an independent writer; damage that headers show."""

from __future__ import annotations

import math
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.data.token_files import TokenFile, TokenFileWriter, entropy_nats
from megallama.data.verify import verify
from megallama.errors import ConfigError, CorruptError

from .conftest import MakeFile

DOCUMENTS = [[1, 5, 6, 2], [1, 7, 2], [1, 2], [1, 9, 9, 9, 9, 2]]
FLAT = [token for document in DOCUMENTS for token in document]


def pack_megatron(prefix: Path, documents: list[list[list[int]]], modes: bytes = b"") -> None:
    """Writes documents, each a list of sequences, from the format's table alone."""
    sequences = [sequence for document in documents for sequence in document]
    starts, ends = [0], [0]
    for sequence in sequences:
        ends.append(ends[-1] + 2 * len(sequence))
    for document in documents:
        starts.append(starts[-1] + len(document))
    S, D = len(sequences), len(starts)
    raw = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, S, D)
    raw += struct.pack(f"<{S}i", *map(len, sequences)) + struct.pack(f"<{S}q", *ends[:-1])
    raw += struct.pack(f"<{D}q", *starts) + modes
    Path(f"{prefix}.idx").write_bytes(raw)
    flat = [token for sequence in sequences for token in sequence]
    Path(f"{prefix}.bin").write_bytes(struct.pack(f"<{len(flat)}H", *flat))


def test_what_is_written_is_read(make_file: MakeFile) -> None:
    file = TokenFile(make_file(DOCUMENTS))
    assert (file.tokens, file.documents) == (len(FLAT), 4)
    assert file.read(0, file.tokens).tolist() == FLAT
    assert file.read(5, 3).tolist() == FLAT[5:8]
    assert file.read(0, 1).dtype == np.int64
    assert [file.document(i).tolist() for i in range(4)] == DOCUMENTS
    assert file.document_starts(0, 15).tolist() == [0, 4, 7, 9]
    assert file.document_starts(4, 5).tolist() == [0, 3]
    assert file.document_starts(10, 5).tolist() == []
    with pytest.raises(IndexError):
        file.read(0, file.tokens + 1)


def test_the_bytes_are_megatrons(make_file: MakeFile, tmp_path: Path) -> None:
    ours = make_file(DOCUMENTS)
    pack_megatron(tmp_path / "theirs", [[document] for document in DOCUMENTS])
    for suffix in (".bin", ".idx"):
        assert Path(f"{ours}{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


@pytest.mark.parametrize("modes", [b"", b"\0\1\0\1"])
def test_documents_of_several_sequences(tmp_path: Path, modes: bytes) -> None:
    prefix = tmp_path / "m"
    pack_megatron(prefix, [[[1, 2], [3]], [], [[4, 5, 6], []]], modes)
    file = TokenFile(prefix)
    assert (file.tokens, file.documents, file.sidecar) == (6, 3, None)
    assert [file.document(i).tolist() for i in range(3)] == [[1, 2, 3], [], [4, 5, 6]]
    assert file.document_starts(0, 6).tolist() == [0, 3]
    verify(file)


@pytest.mark.parametrize("vocab, dtype", [(65_499, "uint16"), (65_500, "int32")])
def test_dtype_follows_the_vocabulary(make_file: MakeFile, vocab: int, dtype: str) -> None:
    file = TokenFile(make_file([[1, vocab - 1, 2]], vocab=vocab))
    assert file.index.dtype == dtype
    assert file.read(0, 3).tolist() == [1, vocab - 1, 2]


def test_megatron_core_reads_ours_and_we_read_its(make_file: MakeFile, tmp_path: Path) -> None:
    theirs = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    dataset = theirs.IndexedDataset(str(make_file(DOCUMENTS)))
    assert [row.tolist() for row in dataset] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]

    prefix = tmp_path / "theirs"
    for dtype in (np.uint16, np.int32):
        builder = theirs.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        builder.add_document(FLAT[:7], [4, 3])
        builder.add_document(FLAT[7:], [2, 6])
        builder.finalize(f"{prefix}.idx")
        file = TokenFile(prefix)
        verify(file)
        assert file.read(0, file.tokens).tolist() == FLAT
        assert file.document_starts(0, file.tokens).tolist() == [0, 7]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_document_starts_against_a_plain_loop(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], data: st.DataObject
) -> None:
    prefix = tmp_path_factory.mktemp("starts") / "t"
    pack_megatron(prefix, [[[7] * length] for length in lengths])
    file = TokenFile(prefix)
    start = data.draw(st.integers(0, file.tokens))
    length = data.draw(st.integers(0, file.tokens - start))
    ends = np.cumsum([0, *lengths])[:-1]
    expected = sorted({int(end) - start for end in ends if start <= end < start + length})
    assert file.document_starts(start, length).tolist() == expected


def test_start_up_does_not_grow_with_the_file(tmp_path: Path) -> None:
    prefix = tmp_path / "giant"  # sparse: 40 GB of tokens, 50M documents, 1 GB of index
    S, length = 50_000_000, 400
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * S * length)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, S, S + 1))
        file.truncate(34 + 12 * S + 8 * (S + 1))
        file.seek(34 + 4 * (S - 1))
        file.write(struct.pack("<i", length))
        file.seek(34 + 12 * S - 8)
        file.write(struct.pack("<q", 2 * (S - 1) * length))
        file.seek(-8, 2)
        file.write(struct.pack("<q", S))
    tracemalloc.start()
    tokens = TokenFile(prefix)
    assert tokens.read(tokens.tokens - 3, 3).tolist() == [0, 0, 0]
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert tokens.tokens == S * length


def test_one_giant_document(tmp_path: Path) -> None:
    prefix, length = tmp_path / "giant", 2**31 - 1
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * length)
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 1, 2)
    Path(f"{prefix}.idx").write_bytes(header + struct.pack("<iqqq", length, 0, 0, 1))
    tokens = TokenFile(prefix)
    assert tokens.tokens == length
    assert tokens.document_starts(1_000_000_000, 4097).tolist() == []


def test_missing_files(make_file: MakeFile) -> None:
    prefix = make_file(DOCUMENTS)
    Path(f"{prefix}.json").unlink()
    assert TokenFile(prefix).sidecar is None
    Path(f"{prefix}.bin").unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*tokens\.bin: No such file"):
        TokenFile(prefix)
    Path(f"{prefix}.idx").unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*tokens\.idx: No such file"):
        TokenFile(prefix)


INDEX_DAMAGE = [
    (lambda raw: b"", "0 bytes are too few"),
    (lambda raw: raw[:33], "33 bytes are too few"),
    (lambda raw: b"X" + raw[1:], "not a token index"),
    (lambda raw: raw[:9] + b"\2" + raw[10:], "index version 2"),
    (lambda raw: raw[:17] + b"\7" + raw[18:], "dtype code 7"),
    (lambda raw: raw[:-1], "truncated or damaged"),
    (lambda raw: raw + b"\0", "truncated or damaged"),
    (lambda raw: raw[:18] + b"\xff" * 16 + raw[34:], "truncated or damaged"),
    (lambda raw: raw[:18] + bytes(16), "no document"),
    (lambda raw: raw[:18] + bytes(8) + b"\1" + bytes(15), "no document"),
    (lambda raw: raw[:-8] + bytes(8), "last document is out of place"),
]


@pytest.mark.parametrize("damage, message", INDEX_DAMAGE)
def test_damage_in_the_index_is_refused(make_file: MakeFile, damage, message: str) -> None:
    prefix = make_file(DOCUMENTS)
    path = Path(f"{prefix}.idx")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptError, match=r"tokens\.idx: .*" + message) as refusal:
        TokenFile(prefix)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("size", [0, 7, 28])
def test_a_bin_of_another_size_is_refused(make_file: MakeFile, size: int) -> None:
    prefix = make_file(DOCUMENTS)
    with open(f"{prefix}.bin", "r+b") as file:
        file.truncate(size)
    with pytest.raises(CorruptError, match=rf"tokens\.bin: {size} bytes where tokens\.idx needs"):
        TokenFile(prefix)


def test_a_bin_cut_while_in_use(make_file: MakeFile) -> None:
    prefix = make_file(DOCUMENTS)
    file = TokenFile(prefix)
    with open(f"{prefix}.bin", "r+b") as stream:
        stream.truncate(8)
    with pytest.raises(CorruptError, match=r"tokens\.bin: truncated at byte 8"):
        file.read(2, 4)


def test_files_of_two_builds(make_file: MakeFile) -> None:
    prefix, other = make_file(DOCUMENTS), make_file(DOCUMENTS[:2], "other")
    Path(f"{other}.json").replace(f"{prefix}.json")
    with pytest.raises(CorruptError, match=r"tokens\.json: .* not of one build"):
        TokenFile(prefix)


def test_an_unfinished_write_leaves_nothing(tmp_path: Path, make_file: MakeFile) -> None:
    prefix = make_file(DOCUMENTS)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted() -> None:
        with TokenFileWriter(prefix, 100) as writer:
            writer.add(np.array([3], np.int32), np.array([1, 3, 2]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_killed_writers_files_do_not_open(tmp_path: Path) -> None:
    writer = TokenFileWriter(tmp_path / "t", 100)
    writer.add(np.array([3], np.int32), np.array([1, 3, 2]))
    writer._bin.close()
    writer._lengths.close()
    with pytest.raises(ConfigError, match=r"t\.idx: No such file"):
        TokenFile(tmp_path / "t")


def test_entropy() -> None:
    assert entropy_nats(np.array([3, 0, 3, 3, 3])) == pytest.approx(math.log(4))
    assert entropy_nats(np.array([0, 9])) == 0
    expected = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert entropy_nats(np.array([1, 3])) == pytest.approx(expected)


def test_a_full_disk_or_a_bad_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write"):
        TokenFileWriter(tmp_path / "file" / "t", 100)
