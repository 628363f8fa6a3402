"""A flipped byte anywhere in a token file is found and named."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from megallama.data import sidecar as sidecar_module
from megallama.data import verify as module
from megallama.data.token_files import TokenFile
from megallama.data.tokenizer import Tokenizer
from megallama.data.verify import check_tokenizer, verify
from megallama.errors import ConfigError, CorruptError

from .conftest import MakeFile

RANDOM = np.random.default_rng(0)
DOCUMENTS = [[1, *RANDOM.integers(3, 100, length).tolist(), 2] for length in range(12)]


def flip(path: Path, at: int, bits: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= bits
    path.write_bytes(raw)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
@pytest.mark.parametrize("bits", [1, 8, 128])
def test_a_flipped_byte_anywhere_is_found(make_file: MakeFile, suffix: str, bits: int) -> None:
    prefix = make_file(DOCUMENTS)
    verify(TokenFile(prefix))
    path = Path(f"{prefix}{suffix}")
    for at in range(path.stat().st_size):
        flip(path, at, bits)
        with pytest.raises(CorruptError, match=r"tokens\.(bin|idx|json): ") as refusal:
            verify(TokenFile(prefix))
        assert "\n" not in str(refusal.value)
        flip(path, at, bits)
    verify(TokenFile(prefix))


@pytest.mark.parametrize("at, block", [(0, 0), (63, 0), (64, 1), (-1, 2)])
def test_the_block_is_named(
    make_file: MakeFile, monkeypatch: pytest.MonkeyPatch, at: int, block: int
) -> None:
    monkeypatch.setattr(sidecar_module, "BLOCK_BYTES", 64)
    monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    prefix = make_file(DOCUMENTS)
    flip(Path(f"{prefix}.bin"), at, 4)
    start = 64 * block
    message = rf"tokens\.bin: block {block} \(bytes {start} to {start + 64}\) is damaged"
    with pytest.raises(CorruptError, match=message):
        verify(TokenFile(prefix))


def test_damage_to_an_index_without_hashes(make_file: MakeFile) -> None:
    prefix = make_file(DOCUMENTS)
    Path(f"{prefix}.json").unlink()
    path, S = Path(f"{prefix}.idx"), len(DOCUMENTS)
    good = path.read_bytes()
    cases = [
        (34 + 4 * 3, struct.pack("<i", -1), "sequence 3 has length -1"),
        (34 + 4 * S + 8 * 5, struct.pack("<q", 2), "sequence 5 has length 7 and offset 2"),
        (34 + 12 * S + 8 * 4, struct.pack("<q", 9), "document 4 starts after document 5"),
    ]
    for at, raw, message in cases:
        path.write_bytes(good[:at] + raw + good[at + len(raw) :])
        with pytest.raises(CorruptError, match=r"tokens\.idx: " + message):
            verify(TokenFile(prefix))
    path.write_bytes(good)
    verify(TokenFile(prefix))


def test_a_token_past_the_vocabulary(make_file: MakeFile) -> None:
    prefix = make_file([[1, 50, 99, 2]])
    verify(TokenFile(prefix), 100)
    with pytest.raises(CorruptError, match=r"tokens\.bin: token 99 at offset 2 is outside"):
        verify(TokenFile(prefix), 60)


def test_the_tokenizer_is_checked(make_file: MakeFile, tokenizer: Tokenizer) -> None:
    check_tokenizer(TokenFile(make_file(DOCUMENTS, tokenizer_hash=tokenizer.hash)), tokenizer)
    with pytest.raises(ConfigError, match=rf"tokenizer a+, but .*tok\.model is {tokenizer.hash}"):
        check_tokenizer(TokenFile(make_file(DOCUMENTS)), tokenizer)


def test_a_sidecar_of_another_format(make_file: MakeFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar_module, "FORMAT", "megallama-tokens-9")
    prefix = make_file(DOCUMENTS)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"tokens\.json: not of format 'megallama-tokens-1'"):
        TokenFile(prefix)
