"""`megallama doctor --calibrate` writes a machine that the planner reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megallama.cli.calibrate import as_machine, calibrate_to, rounded
from megallama.cli.main import main
from megallama.errors import ConfigError
from megallama.plan.hardware import load_hardware
from megallama.train import calibrate, device, kernel_calls, launch
from megallama.train.process import Process

SMALL = kernel_calls.Sizes(64, 64, 96, 32, 128, (16, 64), 2**16, (2**10, 2**12))


def test_a_machine_is_measured_and_its_file_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate, "CPU", SMALL)
    monkeypatch.setattr(calibrate, "SECONDS_A_FIGURE", 1e-4)
    path = tmp_path / "here.yaml"
    assert main(["doctor", "--calibrate", str(path), "--nproc", "2"]) == 0
    machine = load_hardware(str(path))
    assert machine.name == "here"
    assert machine.device == "cpu"
    assert machine.ranks == 2
    assert machine.node == machine.network
    assert machine.gemm.flops.bf16 > 1e6
    assert machine.memory.bandwidth > 1e6
    measured = set(machine.memory.shares.model_fields_set)
    assert measured == set(type(machine.memory.shares).model_fields)
    text = path.read_text()
    assert text.startswith("# Measured by `megallama doctor --calibrate`: 2 ranks at once")


@pytest.mark.parametrize(
    "words, thing",
    [
        (["here.yaml", "--nproc", "1"], "--nproc 1"),
        (["here.yaml", "--nproc", "0"], "--nproc 0"),
        (["here.json"], "here.json"),
        (["nowhere/here.yaml"], "nowhere"),
        (["here.yaml", "--json", "f.json"], "--json f.json"),
        (["here.yaml", "--root", "runs"], "--root runs"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str],
    thing: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--calibrate", *words]) == 78
    error = capsys.readouterr().err
    assert thing in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_figures_have_four_digits() -> None:
    assert rounded({"a": 123456.789, "b": {"c": 7, "d": "x"}}) == {
        "a": 123500.0,
        "b": {"c": 7, "d": "x"},
    }


def test_several_nodes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_two_nodes(nproc: int, prepare: Any, work: Any) -> int:
        return work(prepare(4), Process(0, 4, 0, 2, None, None), None)

    monkeypatch.setattr(launch, "launch", on_two_nodes)
    with pytest.raises(ConfigError, match="--calibrate: measures one machine; start it on one"):
        calibrate_to(tmp_path / "here.yaml", 2)
    assert not list(tmp_path.iterdir())


def test_a_gpu_s_file_names_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the processor beside it."""
    monkeypatch.setattr(device, "device_name", lambda of: f"GPU {of.index}")
    constants = load_hardware("h100").model_dump(exclude={"name"})
    text = as_machine("here", constants, torch.device("cuda", 3), 8)
    assert text.startswith("# Measured by `megallama doctor --calibrate`: 8 ranks at once, GPU 3, ")
