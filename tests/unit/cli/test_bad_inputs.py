"""What a user gets wrong, and what is damaged: one line that names it, and the documented code."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest

from megallama import files
from megallama.cli.main import main
from megallama.data.token_files import TokenFileWriter
from megallama.data.tokenizer import train_tokenizer
from tests.conftest import ConfigFile, TinyData, hash_of

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must end with `code` and one line of error; returns that line."""

    def run(code: int, *words: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == code
        error = capsys.readouterr().err
        assert error.startswith("megallama: error: ")
        assert error.count("\n") == 1
        assert error.endswith("\n")
        return error

    return run


CONFIG_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "heads": (
        {"model.heads": 3, "model.kv_heads": 1},
        "model.heads=3: does not divide model.d_model=16",
    ),
    "odd heads": ({"model.heads": 16}, "model.heads=16: gives heads of odd width"),
    "kv heads": ({"model.kv_heads": 3}, "model.kv_heads=3"),
    "batch": ({"train.global_batch": 5}, "train.global_batch=5: is not a multiple of"),
    "preset": ({"model.preset": "llama-8b"}, "model.preset=llama-8b: is not a choice"),
    "alias": ({"model.hidden_size": 64}, "use model.d_model"),
    "section": ({"trian": {"steps": 5}}, "trian.steps=5: is not a key here; use train.steps"),
    "misspelt": ({"optimizer.wamup_steps": 5}, "use optimizer.warmup_steps"),
    "negative rate": ({"optimizer.lr": -0.1}, "optimizer.lr=-0.1: is too small"),
    "infinite rate": ({"optimizer.lr": float("inf")}, "optimizer.lr=.inf: is not finite"),
    "rates": ({"optimizer.min_lr": 0.5}, "optimizer.min_lr=0.5: is above optimizer.lr=0.01"),
    "negative clip": ({"optimizer.grad_clip": -1.0}, "optimizer.grad_clip=-1.0"),
    "no steps": ({"train.steps": 0}, "train.steps=0: is too small"),
    "no length": ({"train.steps": None}, "train.steps: is missing"),
    "precision": ({"train.precision": "fp16"}, "train.precision=fp16: is not a choice"),
    "name": ({"run.name": "../up"}, "run.name=../up: is not a name"),
    "tensor": ({"parallel.tensor": 2}, "parallel.tensor=2: 1 process does not make this grid"),
    "data": (
        {"parallel.data": 2},
        "parallel.tensor=1 x parallel.data=2: 1 process does not make this grid; start 2 (",
    ),
    "pipeline": (
        {"parallel.pipeline": 2},
        "parallel.tensor=1 x parallel.pipeline=2: 1 process does not make this grid; start 2 (",
    ),
    "no data": ({"data": None}, "data.mixture: "),
    "vocabulary": ({"model.vocab": 256}, "model.vocab=256: "),
    "too small": ({"train.sequence_length": 10_000}, "'code' has "),
    "held out": ({"validation.sequences": 10_000}, "'code' has "),
    "no tokenizer": ({"data.tokenizer": "nowhere.model"}, "nowhere.model: No such file"),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["train", "dry-run"])
def test_a_config_that_cannot_be_trained(
    config_file: ConfigFile, refused: Refused, tmp_path: Path, fault: str, options: list[str]
) -> None:
    changes, words = CONFIG_FAULTS[fault]
    assert words in refused(78, "train", config_file(changes), *options)
    assert not (tmp_path / "runs").exists()


def test_a_config_file_that_is_none(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    assert "config.yaml: no such file" in refused(78, "train", path)
    assert "name a YAML file" in refused(78, "train", tmp_path)
    for content in (b"", b"- 1\n", b"model: [\n", b"\xff\xfe\0"):
        path.write_bytes(content)
        assert str(path) in refused(78, "train", path)


def test_overrides_and_options(config_file: ConfigFile, refused: Refused, tmp_path: Path) -> None:
    path = config_file()
    for words, expected in {
        ("train.steps",): "train.steps: is not section.key=value",
        ("train.steps=[",): "its value is not YAML",
        ("optimizer.lr=-1",): "optimizer.lr=-1: is too small",
        ("--nproc", "0"): "--nproc 0: at least 1 process is needed",
        ("parallel.data=1", "--nproc", "2"): "parallel.data=1: 2 processes do not make this grid",
        ("--nproc", "3"): "train.global_batch=4: is not a multiple of train.micro_batch=2 x 3 data",
        ("--resume", str(tmp_path / "no")): "no: no such checkpoint directory",
    }.items():
        assert expected in refused(78, "train", path, *words)
    assert "--nproc 0" in refused(78, "bench", path, "--nproc", "0")
    two = refused(78, "bench", path, "parallel.data=1", "--nproc", "2")
    assert "2 processes do not make this grid" in two


def test_several_faults_are_a_line_each(
    config_file: ConfigFile, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_file({"model.heads": 3, "model.kv_heads": 1, "optimizer.lr": -1.0})
    assert main(["train", str(path), "train.global_batch=5"]) == 78
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("megallama: error: ")
    lines[0] = lines[0].removeprefix("megallama: error: ")
    assert sorted(line.partition(": ")[0] for line in lines) == [
        "model.heads=3",
        "optimizer.lr=-1.0",
        "train.global_batch=5",
    ]


@pytest.fixture
def damaged(
    tiny_data: TinyData, config_file: ConfigFile, tmp_path: Path
) -> Callable[[str, Callable[[bytes], bytes | None]], tuple[Path, Path]]:
    """Changes a file of a copy of the data; returns the config and the copy's prefix."""
    prefix = tmp_path / "copy"

    def change(suffix: str, edit: Callable[[bytes], bytes | None]) -> tuple[Path, Path]:
        for end in (".bin", ".idx", ".json"):
            shutil.copy(f"{tiny_data.prefixes['code']}{end}", f"{prefix}{end}")
        path = Path(f"{prefix}{suffix}")
        content = edit(path.read_bytes())
        path.unlink() if content is None else path.write_bytes(content)
        mixture = [{"name": "copy", "path": str(prefix), "weight": 1}]
        return config_file({"data.mixture": mixture}), prefix

    return change


def flip(at: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes | None], int]] = {
    "tokens gone": (".bin", lambda raw: None, 78),
    "tokens empty": (".bin", lambda raw: b"", 65),
    "tokens cut": (".bin", lambda raw: raw[:-2], 65),
    "tokens too many": (".bin", lambda raw: raw + b"\0\0", 65),
    "index gone": (".idx", lambda raw: None, 78),
    "index empty": (".idx", lambda raw: b"", 65),
    "index's magic": (".idx", flip(0), 65),
    "index's version": (".idx", flip(9), 65),
    "index's dtype": (".idx", flip(17), 65),
    "index's count": (".idx", flip(18), 65),
    "index cut": (".idx", lambda raw: raw[:-1], 65),
    "index's last document": (".idx", lambda raw: raw[:-8] + b"\xff" * 8, 65),
    "sidecar empty": (".json", lambda raw: b"", 65),
    "sidecar changed": (".json", lambda raw: raw.replace(b"uint16", b"uint32"), 65),
    "sidecar cut": (".json", lambda raw: raw[:-20], 65),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_token_files(
    damaged: Callable[..., tuple[Path, Path]], refused: Refused, tmp_path: Path, kind: str
) -> None:
    suffix, edit, code = DAMAGE[kind]
    config, prefix = damaged(suffix, edit)
    assert str(prefix) in refused(code, "train", config)
    assert str(prefix) in refused(code, "train", config, "--dry-run")
    assert str(prefix) in refused(code, "data", "inspect", prefix)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_flipped_bit_inside_is_found_by_inspect(
    damaged: Callable[..., tuple[Path, Path]], refused: Refused, suffix: str
) -> None:
    _, prefix = damaged(suffix, lambda raw: flip(len(raw) // 2)(raw))
    line = refused(65, "data", "inspect", prefix)
    assert f"{prefix}{suffix}: block 0" in line


def test_a_token_beyond_the_vocabulary_is_found_where_it_is_read(
    tmp_path: Path, config_file: ConfigFile, refused: Refused
) -> None:
    prefix = tmp_path / "wild"
    with TokenFileWriter(prefix, 1000) as writer:
        writer.add(np.array([400], np.int32), np.array([7] * 300 + [777] + [7] * 99))
        writer.finish("a" * 32, 0)
    Path(f"{prefix}.json").unlink()  # a file of Megatron's own: its vocabulary is not known
    mixture = [{"name": "wild", "path": str(prefix), "weight": 1}]
    changes = {"data.mixture": mixture, "data.tokenizer": None, "validation.every": 0}
    line = refused(65, "train", config_file(changes))
    assert f"{prefix}.bin: token 777 at offset 300 is outside" in line
    assert "vocabulary of 300" in line


def test_data_of_another_tokenizer(
    tiny_data: TinyData, tmp_path: Path, config_file: ConfigFile, refused: Refused
) -> None:
    other = tmp_path / "other.model"
    train_tokenizer([tiny_data.tokenizer.with_name("prose.jsonl")], 290, other)
    line = refused(78, "train", config_file({"data.tokenizer": str(other)}))
    assert hash_of(tiny_data) in line
    assert str(tiny_data.prefixes["code"]) in line
    other.write_bytes(b"no model")
    assert str(other) in refused(65, "train", config_file({"data.tokenizer": str(other)}))


def test_a_run_of_another_config(config_file: ConfigFile, refused: Refused, tmp_path: Path) -> None:
    assert main(["train", str(config_file())]) == 0
    written = (tmp_path / "runs" / "tiny" / "config.yaml").read_bytes()
    for override in ("model.ffn=28", "run.seed=5", "train.sequence_length=16", "model.layers=1"):
        line = refused(78, "train", config_file(), override)
        key, _, value = override.partition("=")
        assert f"error: {key}: " in line
        assert f"the config says {value}" in line
    line = refused(78, "train", config_file(), "--resume", "none")
    assert "already holds checkpoints" in line
    assert (tmp_path / "runs" / "tiny" / "config.yaml").read_bytes() == written


def test_a_folder_that_cannot_be_written(
    config_file: ConfigFile, refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    line = refused(78, "train", config_file({"run.root": str(tmp_path / "file")}))
    assert f"cannot write {tmp_path / 'file' / 'tiny'}" in line
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "tiny").write_text("")
    assert str(tmp_path / "runs" / "tiny") in refused(78, "train", config_file())
    assert "cannot write" in refused(78, "train", config_file({"run.root": "/proc/nowhere"}))


def test_damaged_checkpoints(config_file: ConfigFile, refused: Refused, tmp_path: Path) -> None:
    path = config_file({"validation.every": 0})
    assert main(["train", str(path)]) == 0
    folder = tmp_path / "runs" / "tiny" / "checkpoints"
    newest = folder / "step-00000006" / "rank-00000.safetensors"
    newest.write_bytes(newest.read_bytes()[:-4])
    assert str(newest) in refused(65, "generate", folder.parent, "--prompt", "x")
    assert str(newest) in refused(65, "train", path, "--resume", newest.parent)
    (folder / "step-00000003" / "manifest.json").write_text("{}")
    assert "none of its 2 checkpoints is intact" in refused(65, "train", path)


def test_generate(
    config_file: ConfigFile, refused: Refused, tiny_data: TinyData, tmp_path: Path
) -> None:
    tokenizer = tmp_path / "tokenizer.model"
    shutil.copy(tiny_data.tokenizer, tokenizer)
    assert main(["train", str(config_file({"data.tokenizer": str(tokenizer)}))]) == 0
    run = tmp_path / "runs" / "tiny"
    for count in ("0", "-1"):
        line = refused(78, "generate", run, "--prompt", "x", "--tokens", count)
        assert f"--tokens {count}" in line
    assert "nowhere" in refused(78, "generate", tmp_path / "nowhere", "--prompt", "x")
    assert "neither a checkpoint" in refused(78, "generate", tmp_path, "--prompt", "x")
    train_tokenizer([tiny_data.tokenizer.with_name("prose.jsonl")], 290, tokenizer)
    assert "not the tokenizer" in refused(78, "generate", run, "--prompt", "x")


def test_report(refused: Refused, tmp_path: Path) -> None:
    assert "nowhere" in refused(78, "report", tmp_path / "nowhere")
    assert "metrics.jsonl" in refused(78, "report", tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    assert "metrics.jsonl" in refused(78, "report", tmp_path)


def test_bench(config_file: ConfigFile, refused: Refused) -> None:
    path = config_file()
    assert "--steps 0" in refused(78, "bench", path, "--steps", "0")
    assert "--warmup -1" in refused(78, "bench", path, "--warmup", "-1")
    assert "No closing quotation" in refused(78, "bench", path, "--layout", "run.name='a")
    assert "parallel.tensr" in refused(78, "bench", path, "--layout", "parallel.tensr=2")
    assert "would be written over" in refused(78, "bench", path, "--json", path)


def test_a_json_that_cannot_be_written_loses_no_figure(
    config_file: ConfigFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(config_file({"validation.every": 0}))
    unwritable = Path(path) / "figures.json"  # under a file
    assert main(["bench", path, "--steps", "1", "--warmup", "0", "--json", str(unwritable)]) == 78
    shown = capsys.readouterr()
    assert "tokens/s/GPU on 1 × " in shown.out
    assert shown.err.startswith(f"megallama: error: cannot write {unwritable}")
    assert shown.err.count("\n") == 1
    assert main(["train", path]) == 0
    run = tmp_path / "runs" / "tiny"
    capsys.readouterr()
    assert main(["report", str(run), "--json", str(unwritable)]) == 78
    shown = capsys.readouterr()
    assert shown.err.startswith(f"megallama: error: cannot write {unwritable}")
    assert shown.err.count("\n") == 1
    assert (run / "report" / "index.html").exists()
    assert str(run / "report" / "index.html") in shown.out


def test_a_json_is_the_old_one_or_the_new_one(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, old = tmp_path / "run", tmp_path / "old.json"
    run.mkdir()
    (run / "config.yaml").write_text("run: {name: a}\n")
    (run / "metrics.jsonl").write_text('{"step": 1, "tokens": 8, "loss": 2.0}\n')
    old.write_text("{}")
    real = files.sync

    def full(file: BinaryIO) -> None:
        if Path(file.name).name.startswith(old.name):
            raise OSError(errno.ENOSPC, "full")
        real(file)

    monkeypatch.setattr(files, "sync", full)
    for words in (["report", run], ["doctor", "--root", tmp_path]):
        assert f"cannot write {old}: full" in refused(78, *words, "--json", old)
        assert old.read_text() == "{}"
