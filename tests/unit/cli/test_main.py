"""The command line as a whole: help, dispatch, what it imports, and each command on a good run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megallama import __version__
from megallama.cli import train as train_command
from megallama.cli.main import COMMANDS, main
from tests.conftest import ConfigFile

Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)], ids=str)
def test_help_is_there(words: list[str], capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*words, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: megallama {' '.join(words)}".rstrip())
    if not words:
        listed = " ".join(out.split())
        assert all(f" {name} {summary}" in listed for name, summary in COMMANDS.items())


def test_the_help_of_bench_says_how_utilisation_is_counted(capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "6·L·[(2+2K/H)·D²+3·D·F] + 6·V·D + 6·L·D·S" in out
    assert "6·parameters" in out


def test_the_version(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"megallama {__version__}\n"


@pytest.mark.parametrize("words", [[], ["trian", "x.yaml"], ["train"], ["bench", "x", "--step=a"]])
def test_a_wrong_command_is_one_line(words: list[str], capsys: Captured) -> None:
    assert main(words) == 78
    err = capsys.readouterr().err
    assert err.startswith("megallama: error: ")
    assert err.endswith("--help\n")
    assert err.count("\n") == 1


def test_a_reader_that_has_enough_is_no_error() -> None:
    """`megallama doctor | head -1`, with the pipe closed before the first line."""
    reader, writer = os.pipe()
    os.close(reader)
    script = "import sys; from megallama.cli.main import main; sys.exit(main(['doctor']))"
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_the_code_is_right_though_nobody_reads(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that saves after its terminal is gone still asks to be started again."""
    reader, writer = os.pipe() if kind == "pipe" else os.openpty()
    os.close(reader)

    def stopped(args: object) -> int:
        print("the last line")
        return 75

    with open(writer, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(train_command, "run", stopped)
        patch.setattr(sys, "stdout", stream)
        assert main(["train", "x.yaml"]) == 75


LIGHT = """
import sys
from megallama.cli.main import main
heavy = {"torch", "numpy", "wandb", "matplotlib", "sentencepiece", "pyarrow"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
code = main(sys.argv[1:])
assert not heavy & set(sys.modules), heavy & set(sys.modules)
sys.exit(code)
"""


def test_a_bad_config_is_refused_without_torch(config_file: ConfigFile) -> None:
    path = config_file({"model.heads": 3, "model.kv_heads": 1})
    for words in (["train", path], ["train", path, "--dry-run"], ["bench", path]):
        command = [sys.executable, "-c", LIGHT, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 78, done.stderr
        assert done.stderr.startswith("megallama: error: model.heads=3: does not divide")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [["generate"], ["report"], ["doctor"], ["data"], ["tokenizer"]])
def test_no_commands_arguments_need_torch(words: list[str]) -> None:
    """`--help` is at once, and so are wrong arguments."""
    script = LIGHT.replace("code = main(sys.argv[1:])", HELP)
    command = [sys.executable, "-c", script, *words, "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


HELP = """
try:
    main(sys.argv[1:])
except SystemExit as end:
    code = end.code
"""


def test_overrides_may_stand_on_both_sides_of_options(
    config_file: ConfigFile, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    taken: list[tuple[list[str], str]] = []

    def run(args: object) -> int:
        taken.append((args.overrides, args.resume))  # type: ignore[attr-defined]
        return 0

    monkeypatch.setattr(train_command, "run", run)
    path = str(config_file())
    assert main(["train", path, "a.b=1", "--resume", "none", "c.d=2", "--nproc", "1", "e.f=3"]) == 0
    assert main(["train", "--resume", "none", path, "a.b=1"]) == 0
    assert taken == [(["a.b=1", "c.d=2", "e.f=3"], "none"), (["a.b=1"], "none")]
    for words in (["train", path, "--wrong"], ["doctor", "a.b=1"]):
        assert main(words) == 78
        assert f"unrecognized arguments: {words[-1]}" in capsys.readouterr().err


def test_ctrl_c_is_no_traceback(
    config_file: ConfigFile, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def run(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_command, "run", run)
    assert main(["train", str(config_file())]) == 130
    assert capsys.readouterr().err == "megallama: interrupted\n"


def test_from_training_to_a_report(
    config_file: ConfigFile, tmp_path: Path, capsys: Captured
) -> None:
    path, run = str(config_file()), tmp_path / "runs" / "tiny"
    assert main(["train", path, "--dry-run"]) == 0
    assert not run.exists()
    assert main(["train", path, "train.steps=4"]) == 0
    assert main(["train", path, "--resume", str(run)]) == 0
    out = capsys.readouterr().out
    assert "first sample: " in out
    assert f"resumed from {run / 'checkpoints' / 'step-00000004'}" in out

    figures = tmp_path / "figures.json"
    assert main(["report", str(run), "--json", str(figures)]) == 0
    assert str(run / "report" / "index.html") in capsys.readouterr().out
    assert (run / "report" / "index.html").read_text().startswith("<!doctype html>")
    assert (run / "report" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(figures.read_text())["steps"] == 6

    texts = []
    for place in (run, run / "checkpoints" / "step-00000006"):
        assert main(["generate", str(place), "--prompt", "the fox", "--tokens", "3"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("the fox")


def test_bench_prints_what_it_writes(
    config_file: ConfigFile, tmp_path: Path, capsys: Captured
) -> None:
    path, figures = str(config_file()), tmp_path / "figures.json"
    words = ["bench", path, "--steps", "2", "--warmup", "0", "--json", str(figures)]
    assert main(words) == 0
    (header, line, summary) = capsys.readouterr().out.splitlines()
    written = json.loads(figures.read_text())
    rate = f"{written['tokens_per_second_per_gpu']:,.0f}"
    titles = ["layout", "step s", "tokens/s/GPU", "TFLOP/s/GPU", "MFU", "memory", "exposed, s"]
    assert re.split("  +", header.strip()) == titles
    assert line.startswith("tensor=1 pipeline=1 data=1 ")
    assert rate in line
    assert summary.startswith(f"{rate} tokens/s/GPU on 1 × ")
    assert written["steps"] == 2
    assert not (tmp_path / "runs").exists()

    assert main([*words, "--gpu", "cpu"]) == 0
    assert "  predicted  " in capsys.readouterr().out.splitlines()[0]
    said = json.loads(figures.read_text())["predicted"]
    assert said["gpu"] == "cpu"
    assert said["step_seconds"] > 0
    assert said["memory_bytes"] > 0

    two = [*words, "--layout", "train.micro_batch=1", "--layout", "train.micro_batch=2"]
    assert main(two) == 0
    out = capsys.readouterr().out
    assert [line.split(" ")[0] for line in out.splitlines()[1:3]] == two[-3::2]
    assert len(json.loads(figures.read_text())["layouts"]) == 2
