"""Crafted configs, token files and tokenizers: refused in one line for each fault, and no secret
that a config holds is repeated."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import yaml

from megallama.cli.main import main
from megallama.data.token_index import HEADER, MAGIC
from tests.conftest import TinyData
from tests.security.crafted import device, link, pipe, put
from tests.security.test_crafted import DEEP, HUGE, Attack, Bait, bounded, refused

CANARY = "CANARY-7f3a9b"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)
CONFIGS = {
    "a tag that runs a command": "model: !!python/object/apply:os.system ['touch EXECUTED']",
    "a tag that makes an object": "model: !!python/object/new:pathlib.Path ['x']",
    "a tag that imports": "model: !!python/name:os.system",
    "a tag of another kind": "model: !evil {}",
    "a bomb of aliases": BOMB + "model: *m\n",
    "a bomb in a list": BOMB + "data: {mixture: *m}\n",
    "a bomb merged": "a: &a {b: 1}\nmodel: {<<: *m}\n",
    "an alias of itself": "model: &a {layers: *a}\n",
    "a list of itself": "data: {mixture: &a [*a]}\n",
    "deep brackets": "model: " + DEEP[:20_000],
    "an endless number": f"model: {{layers: {HUGE}}}",
    "10**14 layers": "model: {d_model: 8, layers: 100000000000000, heads: 2, vocab: 8}",
    "10**14 stages": "parallel: {pipeline: 100000000000000}",
    "a path out of the runs": "run: {name: ../../etc}",
    "NUL": 'run: {root: "a\\0b"}',
    "not text": "\udcff",
}
SECRETS = {
    "a key that is none": f"log: {{wandb_api_key: {CANARY}}}",
    "a nested key": f"log: {{wandb: {{api_key: {CANARY}}}}}",
    "a section that is none": f"tracker: {{token: {CANARY}}}",
    "a list of secrets": f"tracker: {{password: [{CANARY}]}}",
    "an address for data": f"data: {{mixture: [{{name: a, path: 'https://me:{CANARY}@host/x'}}]}}",
    "an address for a tokenizer": f"data: {{tokenizer: 's3://{CANARY}:x@bucket/t.model'}}",
    "an address for runs": f"run: {{root: 'https://me:{CANARY}@host/'}}",
    "an address where a number is": f"train: {{steps: 'https://me:{CANARY}@host/'}}",
}


@pytest.mark.parametrize("attack", CONFIGS)
def test_a_crafted_config_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], attack: str
) -> None:
    path = tmp_path / "run.yaml"
    text = CONFIGS[attack].replace("EXECUTED", str(tmp_path / "executed"))
    path.write_bytes(text.encode(errors="surrogateescape"))
    with bounded(20):
        assert main(["train", str(path), "--dry-run"]) == 78
    err = capsys.readouterr().err
    assert err.startswith("megallama: error: ")
    assert "Traceback" not in err
    assert all(len(line) < 400 for line in err.splitlines())
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("place", SECRETS)
def test_a_secret_in_a_config_is_refused_and_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(SECRETS[place])
    assert main(["train", str(path)]) == 78
    out, err = capsys.readouterr()
    assert CANARY not in out + err
    section = yaml.safe_load(SECRETS[place]).popitem()[0]
    assert section in err  # the fault is said all the same


@pytest.mark.parametrize(
    "override",
    [
        f"log.api_key={CANARY}",
        f"log.api_key=[{CANARY}",
        f"log.every.hf_token={CANARY}",
        f"data.tokenizer=https://me:{CANARY}@host/x",
    ],
)
def test_a_secret_in_an_override_is_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str
) -> None:
    (tmp_path / "run.yaml").write_text("log: {every: 1}")
    assert main(["train", str(tmp_path / "run.yaml"), override]) == 78
    out, err = capsys.readouterr()
    assert CANARY not in out + err
    assert override.partition("=")[0] in err


def idx(code: int = 8, sequences: int = 1, documents: int = 2, body: bytes = b"") -> Attack:
    return put("x.idx", HEADER.pack(MAGIC, 1, code, sequences, documents) + body)


def entry(length: int, offset: int, *documents: int) -> bytes:
    return struct.pack("<iq", length, offset) + struct.pack(f"<{len(documents)}q", *documents)


TOKENS: dict[str, Attack] = {
    "2**64 sequences": idx(sequences=2**64 - 1),
    "2**64 documents": idx(documents=2**64 - 1),
    "a negative length": idx(body=entry(-5, 0, 0, 1)),
    "an offset of 2**60": idx(sequences=1, body=entry(5, 2**60, 0, 1)),
    "documents beyond": idx(documents=3, body=entry(5, 0, 0, 2**62, 1)),
    "documents before": idx(documents=3, body=entry(5, 0, 0, -7, 1)),
    "an unknown type": idx(code=99),
    "index: a pipe": pipe("x.idx"),
    "index: a device": device("x.idx"),
    "index: a link": link("x.idx"),
    "tokens: a pipe": pipe("x.bin"),
    "tokens: a device": device("x.bin"),
    "tokens: a link": link("x.bin"),
    "sidecar: a pipe": pipe("x.json"),
    "sidecar: a device": device("x.json"),
    "sidecar: a link": link("x.json"),
    "sidecar: deep JSON": put("x.json", DEEP),
    "sidecar: an endless number": put("x.json", '{"xxh3_self": ' + HUGE + "}"),
    "sidecar: a list": put("x.json", "[]"),
    "tokenizer: a pipe": pipe("t.model"),
    "tokenizer: a device": device("t.model"),
    "tokenizer: a link": link("t.model"),
    "tokenizer: empty": put("t.model", b""),
    "tokenizer: a length of 2**63": put("t.model", b"\x0a" + b"\xff" * 9 + b"\x01"),
    "tokenizer: deep groups": put("t.model", b"\x0b" * 100_000),
    "tokenizer: a pickle": put("t.model", b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R."),
}


@pytest.mark.parametrize("attack", TOKENS)
def test_crafted_data_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_data: TinyData, attack: str
) -> None:
    home = tmp_path / "it"
    home.mkdir()
    for suffix in (".bin", ".idx", ".json"):
        whole = Path(f"{tiny_data.prefixes['code']}{suffix}").read_bytes()
        (home / f"x{suffix}").write_bytes(whole)
    (home / "t.model").write_bytes(tiny_data.tokenizer.read_bytes())
    (tmp_path / "secret.txt").write_text("S3CRET-outside-of-every-directory")
    TOKENS[attack](home, Bait(tmp_path / "secret.txt", tmp_path / "executed"))
    words = ("data", "inspect", home / "x", "--tokenizer", home / "t.model")
    assert str(home) in refused(capsys, *words)


def test_a_sidecar_of_other_types_with_its_own_hash_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_data: TinyData
) -> None:
    from megallama.data import sidecar

    for suffix in (".bin", ".idx", ".json"):
        whole = Path(f"{tiny_data.prefixes['code']}{suffix}").read_bytes()
        (tmp_path / f"x{suffix}").write_bytes(whole)
    fields = json.loads((tmp_path / "x.json").read_text())
    del fields["xxh3_self"]
    for change in ({"xxh3_bin": 5}, {"vocab_size": "9"}, {"tokens": 1.5}, {"more": 1}):
        (tmp_path / "x.json").write_bytes(sidecar._dumps({**fields, **change}))
        assert "x.json" in refused(capsys, "data", "inspect", tmp_path / "x")
