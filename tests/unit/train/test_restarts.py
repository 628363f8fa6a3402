"""How often a job begins again by itself, and from where."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megallama.cli.main import main
from megallama.errors import ConfigError, LostError
from megallama.train.restarts import Restarts
from tests.conftest import ConfigFile

LOST = LostError("rank 1 was killed by SIGKILL")


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[int], None]:
    count = 0

    def save(step: int) -> None:
        nonlocal count
        count += 1
        directory = tmp_path / "checkpoints" / f"step-{step:08d}"
        directory.mkdir(parents=True)
        (directory / "manifest.json").touch()
        times = count * 10**9  # two of a moment may have the clock's one tick
        os.utime(directory / "manifest.json", ns=(times, times))

    return save


def restarts(directory: Path, limit: int, resume: str = "auto") -> Restarts:
    """Whose work is the word that it resumes with."""
    return Restarts(limit, directory, lambda resume: resume, resume)  # type: ignore[arg-type,return-value]


def test_without_progress_it_gives_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = restarts(tmp_path, 2)
    assert one.first() == "auto"
    assert [one.again(LOST) for _ in range(3)] == ["auto", "auto", None]
    assert capsys.readouterr().err == (
        f"megallama: {LOST}; restart 1 of 2 from its start\n"
        f"megallama: {LOST}; restart 2 of 2 from its start\n"
    )


def test_a_new_checkpoint_is_progress(
    tmp_path: Path, saved: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    saved(3)
    one = restarts(tmp_path, 1)
    one.first()
    assert one.again(LOST) is not None
    for step in (4, 6, 9):
        saved(step)
        assert one.again(LOST) is not None
    assert one.again(LOST) is None
    assert capsys.readouterr().err.endswith("restart 1 of 1 from step-00000009\n")


def test_a_smaller_step_behind_a_damaged_checkpoint_is_progress(
    saved: Callable[[int], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(10)  # damaged: the run goes on from an older one
    one = restarts(tmp_path, 1)
    one.first()
    for step in (4, 6, 8):
        saved(step)
        assert one.again(LOST) is not None
    assert one.again(LOST) is None
    assert capsys.readouterr().err.endswith("restart 1 of 1 from step-00000008\n")


def test_a_checkpoint_that_is_deleted_is_no_progress(
    saved: Callable[[int], None], tmp_path: Path
) -> None:
    """A spike deletes those after the one that it goes back to, in every attempt."""
    one = restarts(tmp_path, 1)
    saved(4)
    one.first()
    saved(6)
    assert one.again(LOST) is not None
    shutil.rmtree(tmp_path / "checkpoints/step-00000006")
    assert one.again(LOST) is None


def test_it_resumes_as_it_was_told_until_it_has_a_checkpoint_of_its_own(
    tmp_path: Path, saved: Callable[[int], None]
) -> None:
    one = restarts(tmp_path, 5, "another/run")
    assert one.first() == "another/run"
    assert one.again(LOST) == "another/run"
    saved(4)
    assert one.again(LOST) == "auto"


def test_it_costs_nothing_where_it_is_not_asked_for(tmp_path: Path) -> None:
    one = restarts(tmp_path, 0)
    one.first()
    assert one.again(LOST) is None


def test_a_number_below_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--restarts -1"):
        restarts(tmp_path, -1)


def test_a_launcher_restarts_its_own_jobs(
    config_file: ConfigFile, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}
    for name, value in {**places, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert main(["train", str(config_file()), "--restarts", "2"]) == 78
    assert "--restarts 2: leave it out" in capsys.readouterr().err
