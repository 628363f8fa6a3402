"""A table of crafted files by kind and attack, through the commands that would read them.

Each ends in one line and the code 65 or 78. Nothing in a file is executed, nothing outside of its
directory is read, and no command waits or takes memory for what a file declares.
"""

from __future__ import annotations

import resource
import signal
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megallama.cli.main import main
from tests.reference import random_weights
from tests.security import crafted
from tests.security.crafted import (
    NAME,
    SHAPE,
    Attack,
    Bait,
    archive,
    device,
    edit,
    grown,
    index,
    link,
    link_to_whole,
    pickled,
    pipe,
    put,
    replaced,
    rewrite,
    safetensors,
    set_held,
    set_key,
)

SECRET = "S3CRET-outside-of-every-directory"
DEEP = "[" * 200_000 + "]" * 200_000
HUGE = "9" * 100_000
RANK = "rank-00000.safetensors"
PTH = "consolidated.00.pth"
WEIGHTS = random_weights(SHAPE, dtype=torch.float32)
HUGGING_NAME = "model.norm.weight"


def tensor(**values: Any) -> dict[str, Any]:
    """A safetensors header of one tensor."""
    return {HUGGING_NAME: {"dtype": "F32", "shape": [16], "data_offsets": [0, 64], **values}}


CHECKPOINT: dict[str, Attack] = {
    "manifest: deep JSON": put("manifest.json", DEEP),
    "manifest: an endless number": put("manifest.json", '{"format": ' + HUGE + "}"),
    "manifest: no object": put("manifest.json", "[]"),
    "manifest: a key twice": put("manifest.json", '{"format": 1, "format": 1}'),
    "manifest: a pipe": pipe("manifest.json"),
    "manifest: a device": device("manifest.json"),
    "manifest: a link": link("manifest.json"),
    "manifest: a link to a whole one": link_to_whole("manifest.json"),
    "manifest: a file above": set_key("files", 0, "name", value="../secret.txt"),
    "manifest: a file at a path": set_key("files", 0, "name", value="/etc/hostname"),
    "manifest: a file in a folder": set_key("files", 0, "name", value="a/rank-00000.safetensors"),
    "manifest: a file of no name": set_key("files", 0, "name", value=7),
    "manifest: a file of 2**70 bytes": set_key("files", 0, "bytes", value=2**70),
    "manifest: a negative size": set_key("files", 0, "bytes", value=-1),
    "manifest: a header of 2**50 bytes": set_key("files", 0, "header_bytes", value=2**50),
    "manifest: a number as text": set_key("files", 0, "header_bytes", value="8"),
    "manifest: holds everything": set_key("files", 0, "holds", value="f" * 90_000),
    "manifest: holds nothing readable": set_key("files", 0, "holds", value="../"),
    "manifest: an unknown key of a file": set_key("files", 0, "path", value="/etc/hostname"),
    "manifest: files is no list": set_key("files", value=3),
    "manifest: a shape of 2**62": set_key("tensors", NAME, "shape", value=[2**62]),
    "manifest: a shape of 2**80": set_key("tensors", NAME, "shape", value=[2**80]),
    "manifest: a negative shape": set_key("tensors", NAME, "shape", value=[-16]),
    "manifest: a shape of 10,000 dimensions": set_key("tensors", NAME, "shape", value=[1] * 10_000),
    "manifest: an empty shape": set_key("tensors", NAME, "shape", value=[]),
    "manifest: true for 1": set_key("tensors", NAME, "shape", value=[True]),
    "manifest: a type of Python's": set_key("tensors", NAME, "dtype", value="__class__"),
    "manifest: infinity": set_key("files", 0, "bytes", value=float("inf")),
    "manifest: not a number": set_key("tensors", NAME, "shape", value=[float("nan")]),
    "manifest: a config of another kind": set_key("config", value=[1]),
    "manifest: a config without a model": set_key("config", value={}),
    "manifest: a section of another kind": set_key("config", "train", value=5),
    "manifest: a config of a huge model": set_key("config", "model", "layers", value=10**12),
    "manifest: a state of another kind": set_key("state", value=[]),
    "manifest: a state of a deep kind": set_key("state", "step", value={"a": 1}),
    "file: a pipe": pipe(RANK),
    "file: a device": device(RANK),
    "file: a link": link(RANK),
    "file: a link to a whole one": link_to_whole(RANK),
    "header: deep JSON": lambda d, _: crafted.put_header(d, DEEP.encode(), b""),
    "header: no object": lambda d, _: crafted.put_header(d, b"[]", b""),
    "header: an endless number": lambda d, _: crafted.put_header(d, HUGE.encode(), b""),
    "header: another tensor": lambda d, _: rewrite(d, lambda a, b: a.pop(NAME)),
    "header: begins before the data": set_held("data_offsets", [-(10**6), 0], 0),
    "header: ends behind the file": set_held("data_offsets", [10**9, 10**9 + 128], 0),
    "header: another type": set_held("dtype", "F32", 0),
    "header: an unknown type": set_held("dtype", "I8", 0),
    "header: a shape beyond the file": set_held("shape", [2**40], 0),
    "header: a negative shape": set_held("shape", [-1], 0),
    "header: starts before the tensor": set_held("start", [-1]),
    "header: starts behind the tensor": set_held("start", [1]),
    "header: another whole": set_held("shape", [2**40]),
    "header: no rows a block": set_held("rows", 0),
    "header: negative rows": set_held("rows", -5),
    "header: 2**40 rows a block": set_held("rows", 2**40),
    "header: no hashes": set_held("xxh3", []),
    "header: hashes of another kind": set_held("xxh3", 5),
    "header: a million hashes": set_held("xxh3", ["0" * 16] * 1_000_000),
}
HUGGING_FACE: dict[str, Attack] = {
    "header longer than the file": safetensors(b"{}", length=2**62),
    "header of 2**64 - 1": safetensors(b"{}", length=2**64 - 1),
    "deep JSON": safetensors(DEEP.encode()),
    "an endless number": safetensors(b'{"a": ' + HUGE.encode() + b"}"),
    "a key twice": safetensors(b'{"a": {}, "a": {}}'),
    "no object": safetensors(b"[1]"),
    "not UTF-8": safetensors(b"\xff\xfe{}"),
    "offsets beyond the file": safetensors(tensor(data_offsets=[0, 2**50], shape=[2**48])),
    "offsets before the file": safetensors(tensor(data_offsets=[-64, 0]), bytes(64)),
    "offsets turned round": safetensors(tensor(data_offsets=[64, 0]), bytes(64)),
    "overlapping tensors": safetensors({**tensor(), "b": tensor()[HUGGING_NAME]}, bytes(64)),
    "a gap": safetensors(tensor(data_offsets=[8, 72]), bytes(72)),
    "a negative shape": safetensors(tensor(shape=[-4, -4]), bytes(64)),
    "a shape whose product wraps": safetensors(tensor(shape=[2**32, 2**32, 16]), bytes(64)),
    "a shape of 100,000 dimensions": safetensors(tensor(shape=[2**60] * 100_000), bytes(64)),
    "a shape of true": safetensors(tensor(shape=[True, 16]), bytes(64)),
    "a shape of infinity": safetensors(tensor(shape=[float("inf")]), bytes(64)),
    "a shape of text": safetensors(tensor(shape="16"), bytes(64)),
    "an unknown type": safetensors(tensor(dtype="__reduce__"), bytes(64)),
    "another type than the bytes": safetensors(tensor(dtype="F64"), bytes(64)),
    "a type that is a list": safetensors(tensor(dtype=[]), bytes(64)),
    "an entry that is no object": safetensors({HUGGING_NAME: [1, 2]}),
    "a name of a million letters": safetensors({"x" * 10**6: tensor()[HUGGING_NAME]}, bytes(64)),
    "a name of two lines": safetensors({"a\nb": tensor()[HUGGING_NAME]}, bytes(64)),
    "weights: a pipe": pipe("model.safetensors"),
    "weights: a device": device("model.safetensors"),
    "weights: a link": link("model.safetensors"),
    "weights: a link to whole ones": link_to_whole("model.safetensors"),
    "index: a file above": index({HUGGING_NAME: "../beyond.safetensors"}),
    "index: a file at a path": index({HUGGING_NAME: "SECRET"}),
    "index: no text": index({HUGGING_NAME: {"a": 1}}),
    "index: no table": index([]),  # type: ignore[arg-type]
    "index: a pipe": lambda d, b: (index({})(d, b), pipe("model.safetensors.index.json")(d, b)),
    "config: deep JSON": put("config.json", DEEP),
    "config: an endless number": put("config.json", '{"hidden_size": ' + HUGE + "}"),
    "config: a key twice": put("config.json", '{"model_type": "llama", "model_type": "x"}'),
    "config: a pipe": pipe("config.json"),
    "config: a device": device("config.json"),
    "config: a link": link("config.json"),
    "config: infinity": edit("config.json", rms_norm_eps=float("inf")),
    "config: not a number": edit("config.json", rms_norm_eps=float("nan")),
    "config: a negative width": edit("config.json", hidden_size=-16),
    "config: a width of 10**400": edit("config.json", hidden_size=10**400),
    "config: 10**18 layers": edit("config.json", num_hidden_layers=10**18),
    "config: 10**9 layers": edit("config.json", num_hidden_layers=10**9),
    "config: true layers": edit("config.json", num_hidden_layers=True),
    "config: no heads": edit("config.json", num_attention_heads=0),
    "config: heads as text": edit("config.json", num_key_value_heads="2"),
    "config: head width as text": edit("config.json", head_dim="8"),
    "config: a context of 10**30": edit("config.json", max_position_embeddings=10**30),
    "config: RoPE as a list": edit("config.json", rope_scaling=[1], rope_parameters=None),
    "config: RoPE of a list": edit("config.json", rope_parameters={"rope_type": ["llama3"]}),
    "config: RoPE of text": edit("config.json", rope_parameters={"rope_theta": "x"}),
    "config: code of its own": edit(
        "config.json", model_type="x", auto_map={"AutoModel": "evil.Model"}
    ),
    "tokenizer: a link": link("tokenizer.model"),
    "tokenizer.json: a link": link("tokenizer.json"),
    "generation: a link": link("generation_config.json"),
}
META: dict[str, Attack] = {
    "a pickle that runs a command": pickled(lambda bait: {**WEIGHTS, "x": bait.payload()}),
    "a pickle that is a command": pickled(lambda bait: bait.payload()),
    "a pickle alone": crafted.bare_pickle,
    "a pickle that calls os.system": crafted.hooked,
    "a list": pickled(lambda _: list(WEIGHTS.values())),
    "numbers for names": pickled(lambda _: dict(enumerate(WEIGHTS.values()))),
    "a sparse tensor": pickled(lambda _: {**WEIGHTS, "norm.weight": torch.eye(4).to_sparse()}),
    "a tensor of no dimension": pickled(lambda _: {**WEIGHTS, "norm.weight": torch.tensor(1.0)}),
    "a module": pickled(lambda _: torch.nn.Linear(2, 2)),
    "a long name": pickled(lambda _: {**WEIGHTS, "x" * 10**6: torch.ones(1)}),
    "a bomb": replaced("data.pkl", bytes(200 << 20), zipfile.ZIP_DEFLATED),
    "a bomb of numbers": replaced("data/0", bytes(200 << 20), zipfile.ZIP_DEFLATED),
    "a bomb of bzip2": replaced("data/0", bytes(50 << 20), zipfile.ZIP_BZIP2),
    "a pickle of 70 MB": replaced("data.pkl", bytes(70 << 20)),
    "a memo of 2**31": replaced("data.pkl", b"\x80\x02}r\xff\xff\xff\x7f."),
    "a member too short": replaced("data/0", bytes(8)),
    "another byte order": replaced("byteorder", b"big"),
    "a declared size of 2 TiB": grown("file_size"),
    "a declared stored size of 2 TiB": grown("compress_size"),
    "a member twice": archive(
        lambda new, name, raw: (new.writestr(name, raw),) * 1 and new.writestr(name, b"")
    ),
    "an archive that is cut": lambda d, _: (d / PTH).write_bytes((d / PTH).read_bytes()[:-40]),
    "a pipe": pipe(PTH),
    "a device": device(PTH),
    "a link": link(PTH),
    "a link to a whole one": link_to_whole(PTH),
    "params: deep JSON": put("params.json", DEEP),
    "params: an endless number": put("params.json", '{"dim": ' + HUGE + "}"),
    "params: a pipe": pipe("params.json"),
    "params: a link": link("params.json"),
    "params: infinity": edit("params.json", norm_eps=float("inf")),
    "params: 10**18 layers": edit("params.json", n_layers=10**18),
    "params: 10**9 layers": edit("params.json", n_layers=10**9),
    "params: a multiple of 10**30": edit("params.json", multiple_of=10**30),
    "params: a width of 10**400": edit("params.json", dim=10**400),
    "params: a multiplier of 1e308": edit("params.json", ffn_dim_multiplier=1e308),
    "params: a multiplier of infinity": edit("params.json", ffn_dim_multiplier=float("inf")),
    "params: a multiplier that is no number": edit("params.json", ffn_dim_multiplier=float("nan")),
    "params: heads as text": edit("params.json", n_kv_heads="2"),
    "params: true heads": edit("params.json", n_heads=True),
    "params: a context of text": edit("params.json", max_seq_len="x"),
    "params: a vocabulary of a list": edit("params.json", vocab_size=[30]),
    "tokenizer: a link": link("tokenizer.model"),
}
KINDS: dict[str, tuple[Callable[[Path], object], dict[str, Attack], tuple[str, ...]]] = {
    "checkpoint": (crafted.checkpoint, CHECKPOINT, ("convert", "to-hf")),
    "Hugging Face": (crafted.hugging_face, HUGGING_FACE, ("convert", "from-hf")),
    "Meta": (crafted.meta, META, ("convert", "from-meta")),
}
CASES = [(kind, attack) for kind, (_, attacks, _) in KINDS.items() for attack in attacks]


@pytest.fixture
def bait(tmp_path: Path) -> Bait:
    (tmp_path / "secret.txt").write_text(SECRET)
    return Bait(tmp_path / "secret.txt", tmp_path / "executed")


@contextmanager
def bounded(seconds: int = 60, memory: int = 1 << 30) -> Iterator[None]:
    """So that a command that waits, or takes memory as a file declares it, fails."""

    def late(*_: object) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command says that must refuse, in one line."""
    capsys.readouterr()
    with bounded():
        code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert code in (65, 78), (code, out, err)
    *notes, error = err.splitlines()
    assert error.startswith("megallama: error: ")
    assert len(error) < 2000
    assert all(note.startswith("megallama: ") for note in notes)
    assert SECRET not in out + err
    return error


@pytest.mark.parametrize("kind", KINDS)
def test_what_nobody_attacked_is_taken(tmp_path: Path, kind: str) -> None:
    make, _, command = KINDS[kind]
    make(tmp_path / "it")
    with bounded():
        assert main([*command, str(tmp_path / "it"), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("kind, attack", CASES, ids=[" ".join(case) for case in CASES])
def test_a_crafted_file_is_refused(
    tmp_path: Path, bait: Bait, capsys: pytest.CaptureFixture[str], kind: str, attack: str
) -> None:
    make, attacks, command = KINDS[kind]
    make(tmp_path / "it")
    attacks[attack](tmp_path / "it", bait)
    error = refused(capsys, *command, tmp_path / "it", tmp_path / "out")
    assert str(tmp_path / "it") in error
    assert not bait.executed.exists()
    assert not list(tmp_path.glob("out*"))
    if kind == "checkpoint":
        refused(capsys, "checkpoint", "verify", tmp_path / "it")
