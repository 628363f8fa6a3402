"""Every format gives the same documents; every fault is named with its file and place."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from megallama.data import documents as module
from megallama.data.documents import decode_documents, read_chunks
from megallama.errors import ConfigError, CorruptError, UserError

TEXTS = ["one\r\n two", "drei äöü 🎉\x00", "", "  four\n"]


def read(*paths: Path, field: str = "text") -> list[str]:
    chunks = read_chunks(paths, field)
    return [text for chunk in chunks for text in decode_documents(chunk, field)]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts).encode()


def write(path: Path, texts: list[str]) -> Path:
    raw = lines(texts)
    if path.suffix == ".parquet":
        pa.parquet.write_table(pa.table({"id": [1] * len(texts), "text": texts}), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(raw))
    elif path.suffix == ".zst":
        half = len(raw) // 2  # two frames, as parallel compressors write
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(raw[:half]) + compress(raw[half:]))
    else:
        path.write_bytes(raw)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_every_format_gives_the_documents(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, TEXTS)
    assert read(path, path) == TEXTS * 2
    many = [f"document {i} " + "x" * 1000 for i in range(3000)]  # several chunks
    path = write(path, many)
    assert read(path) == many
    assert sum(chunk.consumed for chunk in read_chunks([path], "text")) == path.stat().st_size


def test_a_txt_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("ä\r\n\n b".encode())
    assert read(path) == ["ä\r\n\n b"]


def test_a_long_txt_is_cut_at_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    text = "".join(f"line {i} é\n" for i in range(700_000))
    path.write_text(text)
    parts = read(path)
    assert "".join(parts) == text
    assert len(parts) == -(-path.stat().st_size // module.CHUNK_BYTES)
    assert all(part.endswith("\n") for part in parts)


def test_an_endless_line_is_cut_between_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WHOLE_TEXT_BYTES", 10)
    monkeypatch.setattr(module, "CHUNK_BYTES", 4)
    path = tmp_path / "a.txt"
    path.write_text("🎉é" * 40)
    assert "".join(read(path)) == "🎉é" * 40
    assert len(read(path)) > 10


def test_blank_lines_and_a_missing_last_line_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n  \r\n{"text": "b"}')
    assert read(path) == ["a", "b"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_byte_order_mark_opens_a_jsonl(tmp_path: Path, name: str) -> None:
    raw = b'\xef\xbb\xbf{"text": "\xef\xbb\xbfa"}\n{"text": "b"}\n'
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert read(tmp_path / name) == ["\ufeffa", "b"]


BAD_LINES = [
    (b"{'text'", CorruptError, "line 2: not JSON: .* at column 2"),
    (b'{"text": "a"', CorruptError, "line 2: not JSON"),
    (b"[" * 100_000, CorruptError, "line 2: not JSON"),
    (b"9" * 5000, CorruptError, "line 2: not JSON"),
    (b'"text"', CorruptError, "line 2: a JSON object is needed, not str"),
    (b'{"body": "a"}', ConfigError, r"line 2: no field 'text' \(fields: body\); name it"),
    (b"{}", ConfigError, r"no field 'text' \(fields: none\)"),
    (b'{"text": 3}', CorruptError, "line 2: field 'text' is int, not a string"),
    (b'{"text": null}', CorruptError, "line 2: field 'text' is NoneType"),
    (b'{"text": "a\\ud800"}', CorruptError, r"line 2: .*surrogate pair, \\ud800, at character 1"),
    (b'{"text": "\xff"}', CorruptError, "line 2: not UTF-8 at byte offset 24"),
]


@pytest.mark.parametrize("line, kind, message", BAD_LINES)
def test_a_bad_line_is_named(
    tmp_path: Path, line: bytes, kind: type[UserError], message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(kind, match=r"a\.jsonl: " + f"(?:{message}|.*{message})") as refusal:
        read(path)
    assert "\n" not in str(refusal.value)


def test_bytes_that_are_not_utf8_are_named_by_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n" * 10 + b"bad \xc3(\n")
    message = r"a\.txt: not UTF-8 at byte offset 54"
    with pytest.raises(CorruptError, match=message):
        read(path)
    monkeypatch.setattr(module, "WHOLE_TEXT_BYTES", 20)
    monkeypatch.setattr(module, "CHUNK_BYTES", 7)
    with pytest.raises(CorruptError, match=message):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("damage", ["truncated", "noise", "flipped"])
def test_damaged_compression(tmp_path: Path, name: str, damage: str) -> None:
    path = write(tmp_path / name, [f"some text {i}" for i in range(5000)])
    raw = path.read_bytes()
    middle = len(raw) // 3
    flipped = raw[:middle] + bytes(byte ^ 255 for byte in raw[middle : middle + 8])
    bad = {"truncated": raw[:-20], "noise": b"\x07" * 500, "flipped": flipped + raw[middle + 8 :]}
    path.write_bytes(bad[damage])
    with pytest.raises(CorruptError, match=f"{name}: damaged") as refusal:
        read(path)
    assert "\n" not in str(refusal.value)


def test_parquet_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"text": ["a", None], "n": [1, 2]}), path)
    with pytest.raises(CorruptError, match="row 2: column 'text' is null"):
        read(path)
    with pytest.raises(ConfigError, match=r"no column 'body' \(columns: text, n\)"):
        read(path, field="body")
    with pytest.raises(CorruptError, match="column 'n' is int64"):
        read(path, field="n")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"needs pyarrow: pip install 'megallama\[parquet\]'"):
        read(path)


def test_missing_and_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*none\.txt: No such file"):
        read(tmp_path / "none.txt")
    with pytest.raises(ConfigError, match=r"a\.csv: unknown kind of corpus"):
        read(tmp_path / "a.csv")
    (tmp_path / "d.txt").mkdir()
    with pytest.raises(ConfigError, match=r"cannot read .*d\.txt: Is a directory"):
        read(tmp_path / "d.txt")


def test_an_endless_json_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 100_000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(["x" * 200_000]))
    with pytest.raises(CorruptError, match="line 1 is longer"):
        read(path)
