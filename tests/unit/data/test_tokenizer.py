"""Text survives encoding and decoding byte for byte; a bad corpus or model is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megallama.data import tokenizer as module
from megallama.data.tokenizer import Tokenizer, train_tokenizer
from megallama.errors import ConfigError, CorruptError

any_text = st.text(st.characters(codec="utf-8", exclude_characters=module.SPACE_MARK))
spaced_text = st.text(st.sampled_from("ab \n\t1é🎉" + module.SPACE_MARK), max_size=200)

NASTY = [
    "",
    " ",
    "   ",
    "\n",
    "\t\t\n  \r\n",
    "a  b   c    d",
    "trailing ",
    "line\r\nline\rline\n",
    "<s>",
    "</s><unk> <0x41>",
    "a\x00b\x00",
    "\ufefftext",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "ᚠᛇᚻ ጀ ꙮ 𒀀 \U0010ffff",
    "e\u0301 \u00e9 \u3000 \u00a0 \u2028",
    "⁇ \ufffd \ufffe",
]


@given(any_text)
def test_decode_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", NASTY)
def test_nasty_texts_survive(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids).encode() == text.encode()
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos]) == text
    assert not {tokenizer.bos, tokenizer.eos, 0} & set(ids)


@given(spaced_text)
def test_cutting_a_long_text_changes_no_token(tokenizer: Tokenizer, text: str) -> None:
    whole = tokenizer.encode(text)
    with mock.patch.object(module, "ENCODE_CHARACTERS", 3):
        assert tokenizer.encode(text) == whole


def test_settings_are_llamas(tokenizer: Tokenizer) -> None:
    model = tokenizer._model
    assert [model.unk_id(), tokenizer.bos, tokenizer.eos, model.pad_id()] == [0, 1, 2, -1]
    assert [model.id_to_piece(3 + byte) for byte in (0, 255)] == ["<0x00>", "<0xFF>"]
    assert len(tokenizer.encode("123456")) == 1 + 6  # the leading space, then digits one by one
    assert tokenizer.vocab_size == 400


def test_the_same_corpus_gives_the_same_model(
    tokenizer: Tokenizer, corpus: Path, tmp_path: Path
) -> None:
    assert train_tokenizer([corpus], 400, tmp_path / "again.model").hash == tokenizer.hash


def test_too_large_a_vocabulary_names_the_largest(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too large") as refusal:
        train_tokenizer([corpus], 100_000, tmp_path / "t.model")
    largest = int(re.search(r"(\d+) is the largest", str(refusal.value))[1])
    assert train_tokenizer([corpus], largest, tmp_path / "t.model").vocab_size == largest
    with pytest.raises(ConfigError, match="too large"):
        train_tokenizer([corpus], largest + 1, tmp_path / "t.model")


@pytest.mark.parametrize(
    "size, message",
    [
        (260, "too small .* need 3"),
        (2, "too small: .* need 259$"),
        (1, "too small: .* need 259$"),
        (0, "not positive"),
        (2**31, f"too large: give at most {2**31 - 1}$"),
        (10**12, "too large: give at most"),
    ],
)
def test_too_small_a_vocabulary(corpus: Path, tmp_path: Path, size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_tokenizer([corpus], size, tmp_path / "t.model")


def test_a_bad_line_is_named_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"text": "fine " * 50}) + "\n{'text'\n")
    with pytest.raises(CorruptError, match=r"bad\.jsonl: line 2: not JSON"):
        train_tokenizer([path], 300, tmp_path / "t.model")
    assert list(tmp_path.iterdir()) == [path]


def test_an_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ConfigError, match="corpus is empty"):
        train_tokenizer([tmp_path / "empty.txt"], 300, tmp_path / "t.model")


def test_long_lines_are_learned_from(tmp_path: Path) -> None:
    (tmp_path / "line.txt").write_text("lumberjacks " * 9000)  # one line of 108 kB
    tokenizer = train_tokenizer([tmp_path / "line.txt"], 300, tmp_path / "t.model")
    assert len(tokenizer.encode("lumberjacks")) == 1


@pytest.mark.parametrize("text", ["a\udcff", "a\udcff " * 20_000])
def test_text_that_is_no_unicode_is_refused(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(ConfigError, match=r"not UTF-8 text: .*\\udcff at character 1;") as refusal:
        tokenizer.encode(text)
    assert len(str(refusal.value)) < 200


def test_a_missing_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the tokenizer .*none\.model: No such file"):
        Tokenizer(tmp_path / "none.model")


@pytest.mark.parametrize("damage", ["empty", "truncated", "noise"])
def test_a_damaged_model(tokenizer: Tokenizer, tmp_path: Path, damage: str) -> None:
    raw = tokenizer.path.read_bytes()
    path = tmp_path / "bad.model"
    path.write_bytes(
        {"empty": b"", "truncated": raw[:1000], "noise": bytes(range(255, 0, -1))}[damage]
    )
    with pytest.raises(CorruptError, match=r"bad\.model: not a SentencePiece model"):
        Tokenizer(path)


def test_decoding_an_unknown_token(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="no token 400"):
        tokenizer.decode([400])
