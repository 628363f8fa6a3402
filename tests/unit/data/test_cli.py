"""The commands, end to end: train a tokenizer, build, inspect."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from megallama.cli import data, tokenizer
from megallama.errors import ConfigError, CorruptError

from .conftest import DOCUMENTS


def call(module, *words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args([str(word) for word in words]))


def test_from_text_to_tokens_and_back(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "t.model", tmp_path / "out"
    command = ("train", "--input", corpus, "--vocab-size", 350, "--out", model)
    assert call(tokenizer, *command) == 0
    assert "350 tokens, hash " in capsys.readouterr().out

    command = ("build", "--input", corpus, "--tokenizer", model, "--out", out, "--workers", 1)
    assert call(data, *command, "--json", tmp_path / "build.json") == 0
    line = capsys.readouterr().out
    assert "4 documents, uint16, unigram entropy" in line
    assert "1 empty documents skipped" in line
    assert json.loads((tmp_path / "build.json").read_text())["documents"] == 4

    command = ("inspect", out, "--tokenizer", model, "--document", 3)
    assert call(data, *command, "--json", tmp_path / "inspect.json") == 0
    shown = capsys.readouterr().out
    assert shown.endswith(DOCUMENTS[4] + "\n")
    assert "hashes, index, token ids" in shown
    assert json.loads((tmp_path / "inspect.json").read_text())["vocab_size"] == 350

    with pytest.raises(ConfigError, match="no document 4: they are 0 to 3"):
        call(data, "inspect", out, "--document", 4)
    raw = bytearray(Path(f"{out}.bin").read_bytes())
    raw[20] ^= 1
    Path(f"{out}.bin").write_bytes(raw)
    with pytest.raises(CorruptError, match=r"out\.bin: block 0 \(bytes 0 to"):
        call(data, "inspect", out)


def test_no_command_writes_over_what_it_reads(corpus: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "t.model", tmp_path / "out"
    train = ("train", "--input", corpus, "--vocab-size", 350, "--out")
    build = ("build", "--input", corpus, "--tokenizer", model, "--workers", 1, "--out")
    assert call(tokenizer, *train, model) == 0
    assert call(data, *build, out) == 0
    before = {path: path.read_bytes() for path in (corpus, model, *tmp_path.glob("out.*"))}
    for module, command in (
        (tokenizer, (*train, corpus)),
        (data, (*build, out, "--json", corpus)),
        (data, (*build, out, "--json", f"{out}.json")),
        (data, ("inspect", out, "--json", f"{out}.idx")),
    ):
        with pytest.raises(ConfigError, match="name another output"):
            call(module, *command)
    assert {path: path.read_bytes() for path in before} == before
