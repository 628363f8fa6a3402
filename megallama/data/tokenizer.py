"""The tokenizer: SentencePiece BPE with LLaMA's settings. Decoding gives the text back exactly.

One character cannot survive: U+2581, which SentencePiece itself writes for a space.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import xxhash

from megallama.data.documents import decode_documents, read_chunks
from megallama.errors import ConfigError, CorruptError
from megallama.files import atomic_write, read_plain

SPACE_MARK = "\u2581"
ENCODE_CHARACTERS = 1 << 14  # texts are encoded in pieces of about this size: see `encode`
LINE_CHARACTERS = 1000  # at most 4,000 bytes; the trainer drops lines over 4,192 bytes
SMALLEST_VOCAB = 256 + 3  # the bytes, <unk>, <s> and </s>
LARGEST_VOCAB = 2**31 - 1  # SentencePiece's int
MOST_BYTES = 1 << 30  # of a model; LLaMA's has 0.5 MB
MAX_LINES = 10_000_000  # the trainer holds its lines in memory; of more it keeps a fair sample

# LLaMA's (Touvron et al. 2023, section 2.1, and the settings recorded in its tokenizer.model).
LLAMA_SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "split_digits": True,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": True,
    "allow_whitespace_only_pieces": True,
    "character_coverage": 0.99995,
    "unk_surface": " \u2047 ",
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
}


class Tokenizer:
    """A SentencePiece model: text to token ids and back.

    Raises ConfigError where the file is missing, CorruptError where it is not a model.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        model = read_plain(self.path, MOST_BYTES, "read the tokenizer")
        sentencepiece.set_min_log_level(2)
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(model)
            self._can_cut = self._words_are_separate()
        except (RuntimeError, ValueError):  # a message of its own that is no UTF-8 is a ValueError
            raise CorruptError(f"{self.path}: not a SentencePiece model, or damaged") from None
        self.vocab_size: int = self._model.vocab_size()
        self.bos: int = self._model.bos_id()
        self.eos: int = self._model.eos_id()
        if min(self.vocab_size - 1, self.bos, self.eos) < 0:
            raise ConfigError(f"{self.path}: the model has no <s> or no </s> token")
        self.hash: str = xxhash.xxh3_128_hexdigest(model)

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, without <s> and </s>.

        A long text is cut before words. No token spans the border between a word and the space
        after it, so the ids are the same as those of the whole, and memory stays bounded.
        Raises ConfigError for half a surrogate pair, as bytes that are no UTF-8 become in argv.
        """
        _check_unicode(text)
        if len(text) <= ENCODE_CHARACTERS or not self._can_cut:
            return self._model.encode(text)
        ids: list[int] = []
        for piece in _cut_before_words(text):
            ids += self._model.encode(piece)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; <s> and </s> among them vanish. Raises ConfigError for unknown ids."""
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ConfigError(
                    f"{self.path}: no token {token}: the vocabulary has {self.vocab_size}"
                )
        return self._model.decode([int(t) for t in ids if t not in (self.bos, self.eos)])

    def _words_are_separate(self) -> bool:
        """Whether spaces only open tokens and one is put before the text: true of LLaMA's."""
        pieces = (self._model.id_to_piece(i) for i in range(self._model.vocab_size()))
        spaces_open = all(SPACE_MARK not in piece.lstrip(SPACE_MARK) for piece in pieces)
        probe = " a  b "
        as_pieces = self._model.encode(probe, out_type=str)
        return spaces_open and "".join(as_pieces) == SPACE_MARK + probe.replace(" ", SPACE_MARK)


def _check_unicode(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ConfigError(
            f"not UTF-8 text: it holds \\u{code:04x} at character {error.start}; give it as UTF-8"
        ) from None


def _cut_before_words(text: str) -> Iterator[str]:
    """Cuts `text` at single spaces, which it drops: encoding puts one before every piece."""
    start, last = 0, len(text) - 1  # no cut before an empty rest, which would lose its space
    while True:
        cut = text.find(" ", start + ENCODE_CHARACTERS, last)
        while cut > 0 and text[cut - 1] in (" ", SPACE_MARK):
            cut = text.find(" ", cut + 1, last)
        if cut < 0:
            yield text[start:]
            return
        yield text[start:cut]
        start = cut + 1


def train_tokenizer(
    inputs: Sequence[Path], vocab_size: int, out: Path, text_field: str = "text"
) -> Tokenizer:
    """Trains a tokenizer of `vocab_size` tokens on the documents of `inputs`, into file `out`.

    Raises ConfigError where the corpus cannot fill `vocab_size` or needs more, and the errors of
    `decode_documents`. The same inputs give the same file, byte for byte.
    """
    _check_vocab_size(vocab_size)
    lines = _TrainingLines(_texts(inputs, text_field))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            input_sentence_size=MAX_LINES,
            shuffle_input_sentence=True,
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
            **LLAMA_SETTINGS,
        )
    except Exception as error:
        if lines.failure is not None:
            raise lines.failure from None
        raise _training_error(str(error), vocab_size, lines.count) from None
    if lines.failure is not None:
        raise lines.failure
    with atomic_write(out) as file:
        file.write(model.getvalue())
    return Tokenizer(out)


def _check_vocab_size(vocab_size: int) -> None:
    """What no corpus can mend: SentencePiece names its own sources for these."""
    if vocab_size < 1:
        raise ConfigError(f"--vocab-size {vocab_size} is not positive")
    if vocab_size < SMALLEST_VOCAB:
        raise ConfigError(
            f"--vocab-size {vocab_size} is too small: "
            f"the 256 bytes and 3 special tokens alone need {SMALLEST_VOCAB}"
        )
    if vocab_size > LARGEST_VOCAB:
        raise ConfigError(f"--vocab-size {vocab_size} is too large: give at most {LARGEST_VOCAB}")


class _TrainingLines:
    """The lines of some texts, as the trainer wants them.

    An error met in reading ends the lines and is kept in `failure`: it would not survive the way
    through the C++ trainer.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = texts
        self.count = 0
        self.failure: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self.texts:
                for line in text.replace("\0", "").split("\n"):
                    for start in range(0, len(line), LINE_CHARACTERS):
                        self.count += 1
                        yield line[start : start + LINE_CHARACTERS]
        except BaseException as error:
            self.failure = error


def _texts(inputs: Sequence[Path], text_field: str) -> Iterator[str]:
    for chunk in read_chunks(inputs, text_field):
        yield from decode_documents(chunk, text_field)


def _training_error(message: str, vocab_size: int, lines: int) -> ConfigError:
    if lines == 0:
        return ConfigError("the tokenizer's corpus is empty")
    if largest := re.search(r"value <= (\d+)", message):
        return ConfigError(
            f"--vocab-size {vocab_size} is too large for this corpus: "
            f"{largest[1]} is the largest possible; lower it or give more text"
        )
    if smallest := re.search(r"required_chars\D*\d+ vs (\d+)", message):
        return ConfigError(
            f"--vocab-size {vocab_size} is too small for this corpus: "
            f"its characters and the 256 bytes alone need {smallest[1]}"
        )
    return ConfigError(f"the tokenizer cannot be trained: {message.splitlines()[0]}")
