"""A SentencePiece tokenizer as transformers' `tokenizer.json`, which gives the same ids.

transformers 5 reads `tokenizer.model` too, but gives other ids where a text begins with a space:
781 of 3,000 random pieces of Python source. A test holds this file against SentencePiece.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from megallama.data.tokenizer import SPACE_MARK


def tokenizer_json(path: Path) -> dict[str, Any] | None:
    """The contents of `tokenizer.json`; None where the model has other settings than LLaMA's."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    if not _is_llama_bpe(model):
        return None
    specials = [model.unk_id(), model.bos_id(), model.eos_id()]
    bos = {"SpecialToken": {"id": model.id_to_piece(model.bos_id()), "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    name = bos["SpecialToken"]["id"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(model, token) for token in specials],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE_MARK},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, bos, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {name: {"id": name, "ids": [model.bos_id()], "tokens": [name]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": model.id_to_piece(model.unk_id()),
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {model.id_to_piece(i): i for i in range(model.vocab_size())},
            "merges": list(_merges(model)),
        },
    }


def tokenizer_config(path: Path, exact: bool) -> dict[str, Any]:
    """The contents of `tokenizer_config.json`: `exact` takes `tokenizer.json` as it is.

    Without it transformers makes what it can of `tokenizer.model`.
    """
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast" if exact else "LlamaTokenizer",
        **{f"{name}_token": model.id_to_piece(token) for name, token in ids.items()},
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }


def _is_llama_bpe(model: Any) -> bool:
    """Whether it is a BPE that changes no character and opens words with one mark.

    A BPE's scores are minus the order of its merges; other kinds have logarithms.
    """
    scores = [model.get_score(i) for i in _plain(model)]
    probe = " a  b \ufb01 \u2163 "  # a ligature and a numeral that normalisation would replace
    pieces = "".join(model.encode(probe, out_type=str))
    return (
        all(score <= 0 and score == int(score) for score in scores)
        and model.decode(model.encode(probe)) == probe
        and pieces.startswith(SPACE_MARK * 2 + "a" + SPACE_MARK * 2 + "b")
    )


def _plain(model: Any) -> list[int]:
    """The tokens that are text: neither bytes nor special."""
    odd = (model.is_byte, model.is_control, model.is_unknown, model.is_unused)
    return [i for i in range(model.vocab_size()) if not any(is_odd(i) for is_odd in odd)]


def _merges(model: Any) -> Iterator[list[str]]:
    """Every pair of pieces that makes a piece, in the order in which SentencePiece merges."""
    plain = sorted(_plain(model), key=lambda i: -model.get_score(i))
    pieces = [model.id_to_piece(i) for i in plain]
    known = set(pieces)
    for piece in pieces:
        for cut in range(1, len(piece)):
            if piece[:cut] in known and piece[cut:] in known:
                yield [piece[:cut], piece[cut:]]


def _added_token(model: Any, token: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": model.id_to_piece(token), **flags, "special": True}
