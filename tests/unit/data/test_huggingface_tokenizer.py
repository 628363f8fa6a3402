"""`tokenizer.json` against SentencePiece: the same ids and the same text back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megallama.data.huggingface_tokenizer import tokenizer_config, tokenizer_json
from megallama.data.tokenizer import LLAMA_SETTINGS, Tokenizer
from tests.conftest import TinyData

SENTENCES = ["the fox and a dog sleep under an old tree", "def x(a, b): return 12 + 345"] * 50


@pytest.fixture(scope="module")
def both(
    tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, PreTrainedTokenizerBase]:
    """Ours, and transformers' from what is written for it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    path = tiny_data.tokenizer
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(path)))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(path, exact=True)))
    return Tokenizer(path), AutoTokenizer.from_pretrained(folder)


# The mark that stands for a space cannot survive either; special tokens are text to us alone.
TEXTS = st.text(
    st.sampled_from("aehnotx 01_(\n\t\u00e9\u6f22\U0001f600\u2163\ufb01.,<>"), max_size=40
)
WORDS = st.lists(
    st.sampled_from(["the", " fox", "  ", "def ", "(a, b)", "12", "tree"]), max_size=12
)


@given(text=TEXTS | WORDS.map("".join))
@settings(max_examples=300, deadline=None)
def test_the_ids_and_the_text_are_sentencepiece_s(
    both: tuple[Tokenizer, PreTrainedTokenizerBase], text: str
) -> None:
    ours, theirs = both
    ids = theirs(text)["input_ids"]
    assert ids == [ours.bos, *ours.encode(text)]
    assert theirs.decode(ids, skip_special_tokens=True) == text


def test_special_tokens(both: tuple[Tokenizer, PreTrainedTokenizerBase]) -> None:
    ours, theirs = both
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (
        ours.bos,
        ours.eos,
        0,
    )
    assert len(theirs) == ours.vocab_size


@pytest.mark.parametrize(
    "other",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nfkc"},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
    ],
    ids=lambda other: next(iter(other)),
)
def test_other_kinds_are_not_written(tmp_path: Path, other: dict[str, object]) -> None:
    """Each differs from LLaMA's settings in one, and those alone are written."""
    assert tokenizer_json(train(tmp_path, {})) is not None
    path = train(tmp_path, other)
    assert tokenizer_json(path) is None
    assert tokenizer_config(path, exact=False)["tokenizer_class"] == "LlamaTokenizer"


def train(folder: Path, changes: dict[str, object]) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(folder / "other"),
        vocab_size=300,
        hard_vocab_limit=False,
        minloglevel=2,
        **{**LLAMA_SETTINGS, **changes},
    )
    return folder / "other.model"
