"""A small tokenizer and small token files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from megallama.data.token_files import TokenFileWriter
from megallama.data.tokenizer import Tokenizer, train_tokenizer

DOCUMENTS = [
    "def add(first, second):\n    return first + second  # the sum, 1234 times\n" * 3,
    "The quick brown fox jumps over the lazy dog; the dog sleeps.\r\n\tA tab, naïve café.",
    "",
    "日本語の文章と 🎉 emoji",
    "  leading spaces, and   runs of    them  ",
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DOCUMENTS as a .jsonl."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return path


@pytest.fixture(scope="session")
def tokenizer(corpus: Path) -> Tokenizer:
    return train_tokenizer([corpus], 400, corpus.with_name("tok.model"))


MakeFile = Callable[..., Path]


@pytest.fixture
def make_file(tmp_path: Path) -> MakeFile:
    """Writes documents of token ids as a token file and returns its prefix."""

    def make(
        documents: Sequence[Sequence[int]],
        name: str = "tokens",
        vocab: int = 100,
        tokenizer_hash: str = "a" * 32,
    ) -> Path:
        prefix = tmp_path / name
        with TokenFileWriter(prefix, vocab) as writer:
            for document in documents:
                writer.add(np.array([len(document)], np.int32), np.array(document))
            writer.finish(tokenizer_hash, 0)
        return prefix

    return make
