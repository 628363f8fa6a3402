"""`megallama check`: what it prints and writes, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megallama.check import job
from megallama.cli.main import main
from megallama.parallel.zero import Zero
from tests.conftest import ConfigFile

Captured = pytest.CaptureFixture[str]
TWO_BY_TWO = ["parallel.tensor=2", "parallel.pipeline=2", "model.layers=2"]


def test_a_job_that_matches(config_file: ConfigFile, capsys: Captured, tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    words = ["check", str(config_file()), "--gpus", "8", *TWO_BY_TWO, "train.global_batch=8"]
    assert main([*words, "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "on 8 ranks: tensor 2 x data 2 x pipeline 2, 1f1b" in text
    assert "all match" in text
    assert "pp 1 (layers 1 to 1): sends data" in text
    found = json.loads(out.read_text())
    assert found["ok"] is True
    assert found["fault"] is None
    assert found["ranks"] == 8
    assert sum(kind["ranks"] for kind in found["kinds"]) == 8
    for kind in found["kinds"]:
        assert kind["sent_bytes"]["tensor"] > 0
        assert kind["memory_bytes"] == sum(kind["memory"].values())
        assert kind["counted"]["weights"] == kind["memory"]["weights"]


def test_a_job_that_does_not(
    config_file: ConfigFile, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first tensor rank sums no norms."""
    gradients = Zero._norm_gradients

    def some(zero: Zero) -> list[torch.Tensor]:
        group = zero.groups.tensor
        return [] if group is not None and group.rank == 0 else gradients(zero)

    monkeypatch.setattr(Zero, "_norm_gradients", some)
    out = tmp_path / "check.json"
    words = ["check", str(config_file()), "--gpus", "2", "parallel.tensor=2", "--json", str(out)]
    assert main(words) == 1
    text = capsys.readouterr().out
    fault: dict[str, Any] = json.loads(out.read_text())["fault"]
    assert fault["kind"] == "mismatch"
    assert fault["ranks"] == [0, 1]
    assert f"fault (mismatch): {fault['text']}" in text
    assert "rank 1 asks for all_reduce" in text
    assert all(site in text for site in fault["sites"])
    assert "all match" not in text


def test_a_ledger_that_differs_is_a_fault(
    config_file: ConfigFile, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "kept_bytes", lambda *_: {"saved activations": 1})
    assert main(["check", str(config_file()), "--gpus", "1"]) == 1
    assert "the ledger says 1;" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, says",
    [
        (["--gpus", "0"], "--gpus 0: at least 1 is needed"),
        (["--gpus", "3", "parallel.tensor=2"], "3 processes do not make this grid"),
        ([], "required: --gpus"),
        (["--gpus", "2", "parallel.tensor=2", "--json", "/dev/null/f"], "cannot write /dev/null/f"),
    ],
)
def test_a_mistake_is_one_line(
    config_file: ConfigFile, capsys: Captured, words: list[str], says: str
) -> None:
    assert main(["check", str(config_file()), *words]) == 78
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1


def test_the_config_is_not_written_over(config_file: ConfigFile, capsys: Captured) -> None:
    path = config_file()
    text = path.read_text()
    assert main(["check", str(path), "--gpus", "1", "--json", str(path)]) == 78
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "is read and would be written over" in shown.err
    assert shown.err.count("\n") == 1
    assert path.read_text() == text
