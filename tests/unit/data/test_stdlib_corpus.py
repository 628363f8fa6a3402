"""The standard library as a corpus."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megallama.data.stdlib_corpus import LEFT_OUT, stdlib_sources, write_stdlib_corpus
from megallama.errors import ConfigError


def test_it_holds_the_sources_in_order(tmp_path: Path) -> None:
    root = tmp_path / "lib"
    (root / "json" / "tests").mkdir(parents=True)
    for number in range(120):
        (root / f"m{number:03}.py").write_text(f"x = {number}  # é\n")
    (root / "json" / "tests" / "t.py").write_text("left out")
    (root / "_sysconfigdata_linux.py").write_text("left out")
    (root / "latin.py").write_bytes(b"# coding: latin-1\n# \xe9\n")
    files, characters = write_stdlib_corpus(tmp_path / "c.jsonl", root)
    lines = (tmp_path / "c.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert (files, characters) == (121, sum(map(len, texts)))
    assert texts == ["# coding: latin-1\n# é\n", *(f"x = {n}  # é\n" for n in range(120))]


def test_this_pythons_library(tmp_path: Path) -> None:
    files, characters = write_stdlib_corpus(tmp_path / "c.jsonl")
    assert files > 300
    assert characters > 5_000_000


def test_a_python_without_sources(tmp_path: Path) -> None:
    (tmp_path / "only.py").touch()
    with pytest.raises(ConfigError, match="only 1 Python sources"):
        write_stdlib_corpus(tmp_path / "c.jsonl", tmp_path)
    assert not (tmp_path / "c.jsonl").exists()
    assert "tests" in LEFT_OUT
    assert [path.name for path in stdlib_sources(tmp_path)] == ["only.py"]
