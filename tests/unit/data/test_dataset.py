"""Batches against slices of the tokens; document masks; files that do not fit the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.data.dataset import Dataset
from megallama.data.token_files import TokenFile, TokenFileWriter
from megallama.errors import ConfigError, CorruptError
from megallama.spec.labels import IGNORE

from .conftest import MakeFile

S = 16
RANDOM = np.random.default_rng(0)


def some_documents(count: int, longest: int = 20) -> list[list[int]]:
    lengths = RANDOM.integers(0, longest, count)
    return [[1, *RANDOM.integers(3, 100, n).tolist(), 2] for n in lengths]


def dataset(prefix: Path, **changes) -> Dataset:
    arguments = {
        "phases": [(None, [("all", prefix, 1)])],
        "sequence_length": S,
        "seed": 7,
        "vocab": 100,
    }
    return Dataset(**{**arguments, **changes})


def test_batches_are_windows_of_the_file(make_file: MakeFile) -> None:
    web, code = make_file(some_documents(60), "web"), make_file(some_documents(40), "code")
    phases = [(None, [("web", web, "0.75"), ("code", code, "0.25")])]
    data = dataset(web, phases=phases, validation_sequences=2)
    assert data.source_names == ["code", "web"]
    flat = [TokenFile(code), TokenFile(web)]
    batch = data.batch(5, 40)
    assert (batch.tokens_NS.shape, batch.labels_NS.shape) == ((40, S), (40, S))
    assert batch.document_lengths is None
    assert np.bincount(batch.sources_N).tolist() == [10, 30]
    where = data.order.locate(np.arange(5, 45))
    for n in range(40):
        window = flat[batch.sources_N[n]].read(int(where.window[n]) * S, S + 1)
        assert np.array_equal(batch.tokens_NS[n], window[:-1])
        assert np.array_equal(batch.labels_NS[n], window[1:])
    halves = np.concatenate([data.batch(5, 13).tokens_NS, data.batch(18, 27).tokens_NS])
    assert np.array_equal(halves, batch.tokens_NS)

    held = data.validation_batch(1, 0, 2)
    assert held.sources_N.tolist() == [1, 1]
    trained = {row.tobytes() for row in data.batch(0, 500).tokens_NS}
    assert not trained & {row.tobytes() for row in held.tokens_NS}


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32))
def test_document_masks(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    random = np.random.default_rng(seed)
    documents = [[1, *random.integers(3, 100, n).tolist(), 2] for n in random.integers(0, 40, 50)]
    prefix = tmp_path_factory.mktemp("masks") / "t"
    with TokenFileWriter(prefix, 100) as writer:
        flat = [token for document in documents for token in document]
        writer.add(np.array([len(d) for d in documents], np.int32), np.array(flat))
        writer.finish("a" * 32, 0)
    data, plain = dataset(prefix, mask_documents=True), dataset(prefix)
    batch, whole = data.batch(0, 20), plain.batch(0, 20)
    assert np.array_equal(batch.tokens_NS, whole.tokens_NS)
    # <s> opens every document and stands nowhere else: the masks can be told from the tokens.
    assert np.array_equal(batch.labels_NS == IGNORE, whole.labels_NS == 1)
    kept = batch.labels_NS != IGNORE
    assert np.array_equal(batch.labels_NS[kept], whole.labels_NS[kept])
    for tokens, lengths in zip(batch.tokens_NS, batch.document_lengths, strict=True):
        borders = [0, *(i for i in range(1, S) if tokens[i] == 1), S]
        assert lengths == np.diff(borders).tolist()
        assert sum(lengths) == S


def test_a_token_past_the_vocabulary_is_named(make_file: MakeFile) -> None:
    prefix = make_file([[1, *[5] * 40, 2]])
    with open(f"{prefix}.bin", "r+b") as file:
        file.seek(2 * 3)
        file.write(b"\x64\0")  # token 100 at offset 3
    with pytest.raises(CorruptError, match=r"tokens\.bin: block 0 .* is damaged"):
        dataset(prefix)  # small enough to be verified whole
    Path(f"{prefix}.json").unlink()  # a file of Megatron's own has no hashes
    data = dataset(prefix)
    with pytest.raises(CorruptError, match=r"tokens\.bin: token 100 at offset 3 is outside"):
        data.batch(0, 2)
    assert dataset(prefix, vocab=101).batch(0, 2).tokens_NS.max() == 100


def test_vocabularies_must_fit(make_file: MakeFile) -> None:
    prefix = make_file(some_documents(30))
    dataset(prefix, vocab=128)
    with pytest.raises(ConfigError, match=r"its tokenizer has 100 tokens, .* only 99"):
        dataset(prefix, vocab=99)


def test_tokenizers_must_agree(make_file: MakeFile) -> None:
    a = make_file(some_documents(30), "a", tokenizer_hash="a" * 32)
    b = make_file(some_documents(30), "b", tokenizer_hash="b" * 32)
    dataset(a, tokenizer_hash="a" * 32)
    with pytest.raises(ConfigError, match=r"/a was built with tokenizer a{32}, but .* is c{32}"):
        dataset(a, tokenizer_hash="c" * 32)
    with pytest.raises(ConfigError, match=r"/b was built with tokenizer b{32}, but .*/a is a{32}"):
        dataset(a, phases=[(None, [("a", a, 1), ("b", b, 1)])])


def test_names_and_files_pair_one_to_one(make_file: MakeFile) -> None:
    a, b = make_file(some_documents(30), "a"), make_file(some_documents(30), "b")
    dataset(a, phases=[(99, [("a", a, 1)]), (None, [("a", a, 1), ("b", b, 1)])])
    with pytest.raises(ConfigError, match=r"'a' is both .*/a and .*/b"):
        dataset(a, phases=[(99, [("a", a, 1)]), (None, [("a", b, 1)])])
    with pytest.raises(ConfigError, match="'a' and 'b' are the same file"):
        dataset(a, phases=[(None, [("a", a, 1), ("b", a, 1)])])
    with pytest.raises(ConfigError, match="'a' is named twice"):
        dataset(a, phases=[(None, [("a", a, 1), ("a", a, 1)])])


def test_too_small_a_corpus_is_named(make_file: MakeFile) -> None:
    prefix = make_file([[1, 5, 2]])
    with pytest.raises(ConfigError, match="'all' has 3 tokens, but 17 are needed"):
        dataset(prefix)


def test_files_without_a_sidecar(make_file: MakeFile) -> None:
    prefix = make_file(some_documents(30))
    Path(f"{prefix}.json").unlink()
    assert dataset(prefix, tokenizer_hash="c" * 32).batch(0, 3).tokens_NS.shape == (3, S)
