"""Two runs side by side: how far apart their losses are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megallama.cli.main import main
from megallama.errors import ConfigError
from megallama.train.comparison import compare
from megallama.train.record import read_run


def run_with(directory: Path, losses: dict[int, float | None]) -> Path:
    directory.mkdir()
    rows = (json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in losses.items())
    (directory / "metrics.jsonl").write_text("".join(rows))
    return directory


@pytest.fixture
def two_runs(tmp_path: Path) -> tuple[Path, Path]:
    """They differ by 1/8 at step 3 and 1/2 at step 12; step 4 has no loss in one of them."""
    mine = {step: 8.0 for step in range(1, 13)} | {3: 8.125, 4: None, 12: 7.5}
    theirs = {step: 8.0 for step in range(1, 14)}
    return run_with(tmp_path / "mine", mine), run_with(tmp_path / "theirs", theirs)


def test_the_largest_differences(two_runs: tuple[Path, Path]) -> None:
    mine, theirs = map(read_run, two_runs)
    for comparison in (compare(mine, theirs), compare(theirs, mine)):
        assert (comparison.early, comparison.largest, comparison.at_step) == (0.125, 0.5, 12)
    assert compare(mine, mine).largest == 0


def test_runs_that_began_at_other_steps_do_not_compare(tmp_path: Path) -> None:
    early = read_run(run_with(tmp_path / "a", {1: 8.0, 2: 8.0, 20: 7.0}))
    late = read_run(run_with(tmp_path / "b", {11: 8.0, 20: 7.0}))
    with pytest.raises(ConfigError, match=r"^--against: a and b have none of steps 1-10 in common"):
        compare(early, late)


def test_the_command(two_runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    mine, theirs = two_runs
    figures = mine / "figures.json"
    words = ["report", str(mine), "--against", str(theirs), "--json", str(figures)]
    assert main(words) == 0
    said = "loss against theirs: largest difference over steps 1-10 1.2e-01 nats"
    assert said in capsys.readouterr().out
    assert said in (mine / "report" / "index.html").read_text()
    assert json.loads(figures.read_text())["largest_early_difference"] == 0.125
