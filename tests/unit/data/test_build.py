"""A build is the documents, encoded, in order, for any number of workers."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from megallama.data import documents
from megallama.data.build import build
from megallama.data.token_files import TokenFile
from megallama.data.tokenizer import SPACE_MARK, Tokenizer
from megallama.data.verify import verify
from megallama.errors import ConfigError, CorruptError

from .conftest import DOCUMENTS


def test_documents_are_encoded_in_order(tokenizer: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    report = build([corpus], tokenizer.path, tmp_path / "out", workers=1, progress=seen.append)
    file = TokenFile(tmp_path / "out")
    verify(file)
    texts = [text for text in DOCUMENTS if text]
    expected = [[tokenizer.bos, *tokenizer.encode(text), tokenizer.eos] for text in texts]
    assert [file.document(i).tolist() for i in range(file.documents)] == expected
    assert [tokenizer.decode(file.document(i).tolist()) for i in range(file.documents)] == texts
    assert report.sidecar == file.sidecar
    assert (report.empty_documents, report.cut_files) == (1, 0)
    assert sum(seen) == corpus.stat().st_size

    counts = Counter(token for document in expected for token in document).values()
    entropy = -sum(c / file.tokens * math.log(c / file.tokens) for c in counts)
    assert report.sidecar.unigram_entropy_nats == pytest.approx(entropy, rel=1e-12)
    assert report.sidecar.tokenizer_hash == tokenizer.hash
    assert report.sidecar.vocab_size == tokenizer.vocab_size


def test_workers_do_not_change_the_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    texts = [f"document {i}: " + "words and words " * (i % 90) for i in range(5000)]
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    for workers in (1, 2):
        build([path], tokenizer.path, tmp_path / f"w{workers}", "body", workers)
    for suffix in (".bin", ".idx", ".json"):
        assert (tmp_path / f"w1{suffix}").read_bytes() == (tmp_path / f"w2{suffix}").read_bytes()
    assert TokenFile(tmp_path / "w2").documents == 5000


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_line_leaves_no_files(tokenizer: Tokenizer, tmp_path: Path, workers: int) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' * 40_000 + '{"text": 1}\n')
    with pytest.raises(CorruptError, match=r"bad\.jsonl: line 40001: field 'text' is int"):
        build([path], tokenizer.path, tmp_path / "out", workers=workers)
    assert list(tmp_path.iterdir()) == [path]


def test_space_marks_and_cut_files_are_counted(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "WHOLE_TEXT_BYTES", 100)
    monkeypatch.setattr(documents, "CHUNK_BYTES", 50)
    (tmp_path / "a.txt").write_text("a line of text\n" * 20)
    (tmp_path / "b.txt").write_text(f"one{SPACE_MARK}two")
    inputs = [tmp_path / "a.txt", tmp_path / "b.txt"]
    report = build(inputs, tokenizer.path, tmp_path / "out", workers=1)
    assert (report.cut_files, report.sidecar.documents_with_u2581) == (1, 1)
    file = TokenFile(tmp_path / "out")
    assert file.documents == 6
    assert tokenizer.decode(file.document(5).tolist()) == "one two"


def test_nothing_to_build(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ConfigError, match=r"no text in .*empty\.txt"):
        build([tmp_path / "empty.txt"], tokenizer.path, tmp_path / "out", workers=1)
    with pytest.raises(ConfigError, match="--workers 0"):
        build([tmp_path / "empty.txt"], tokenizer.path, tmp_path / "out", workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_a_second_build_replaces_the_first(
    tokenizer: Tokenizer, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("short")
    build([corpus], tokenizer.path, tmp_path / "out", workers=1)
    build([tmp_path / "a.txt"], tokenizer.path, tmp_path / "out", workers=1)
    file = TokenFile(tmp_path / "out")
    verify(file)
    assert file.documents == 1
