"""The examples run, and do what the commands do."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from megallama.cli.main import main
from tests.conftest import ConfigFile

CUSTOM_LOOP = Path(__file__).parents[3] / "examples" / "custom_loop.py"


def test_the_custom_loop_trains_what_the_command_trains(
    config_file: ConfigFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(config_file())
    assert main(["train", path]) == 0
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [str(CUSTOM_LOOP), path, "log.every=2"])
    runpy.run_path(str(CUSTOM_LOOP), run_name="__main__")
    out = capsys.readouterr().out
    assert out.count("gradient norm") == 6
    step = Path("checkpoints", "step-00000006", "rank-00000.safetensors")
    runs = tmp_path / "runs"
    assert (runs / "custom-loop" / step).read_bytes() == (runs / "tiny" / step).read_bytes()
    assert main(["generate", str(runs / "custom-loop"), "--prompt", "def", "--tokens", "2"]) == 0


def test_its_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(CUSTOM_LOOP), "nowhere.yaml"])
    with pytest.raises(SystemExit, match=r"^error: nowhere\.yaml: no such file"):
        runpy.run_path(str(CUSTOM_LOOP), run_name="__main__")


def test_it_fits_a_page() -> None:
    assert len(CUSTOM_LOOP.read_text().splitlines()) < 60
