"""`megallama report --gpu`: the planner's prediction beside a run that was made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megallama.cli.main import main
from megallama.cli.plan_timeline import beside_measured
from megallama.cli.report_prediction import predict_run
from megallama.plan.hardware import load_hardware
from megallama.plan.predict import predict
from megallama.train.record import read_run
from megallama.train.trace import PREDICTED, RankTimeline, Timeline
from tests.conftest import ConfigFile


@pytest.fixture
def run(config_file: ConfigFile, tmp_path: Path) -> Path:
    """A run of one process, of which a step was recorded."""
    path = str(config_file({"train.profile": {"start": 2, "steps": 1}}))
    assert main(["train", path, "train.steps=3"]) == 0
    return tmp_path / "runs" / "tiny"


def test_a_run_stands_beside_its_prediction(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = read_run(run)
    predicted = predict_run(record, run, "cpu")
    step = predict(predicted.plan.config, load_hardware("cpu"), 1)
    figures = tmp_path / "figures.json"
    capsys.readouterr()
    assert main(["report", str(run), "--gpu", "cpu", "--json", str(figures)]) == 0
    page, line = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{step.step_seconds:.3g} s predicted for cpu, ")
    assert f"<td>{line}</td>" in Path(page).read_text()
    assert record.timeline is not None
    measured = f"step 2, {1e3 * record.timeline.seconds:,.0f} ms on 1 rank; "
    assert measured in Path(page).read_text()
    written = json.loads(figures.read_text())
    assert written["predicted"]["step_seconds"] == step.step_seconds
    assert written["median_step_seconds"] > 0

    drawn = predicted.beside(record)
    assert drawn is not None
    over, under = drawn.ranks
    assert (over.name, under.name) == ("pp 0 · dp 0 · tp 0", PREDICTED)
    passes = [event.text for event in over.events if event.lane == "compute"]
    assert [e.text for e in under.events if e.kind in ("F", "BW")] == [
        text for text in passes if text.startswith(("F", "BW"))
    ]
    assert max(event.end for event in under.events) == pytest.approx(step.step_seconds, rel=1e-6)


def test_every_measured_rank_stands_over_its_stage(config_file: ConfigFile, run: Path) -> None:
    plan = predict_run(read_run(run), run, "cpu").plan
    names = ("pp 0 · dp 0 · tp 0", "pp 0 · dp 1 · tp 0")
    both = beside_measured(plan, Timeline(2, tuple(RankTimeline(n, "", ()) for n in names)))
    assert [rank.name for rank in both.ranks] == [names[0], PREDICTED, names[1], PREDICTED]
    assert both.ranks[1].events == both.ranks[3].events != ()


def test_a_machine_that_is_not_known_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["report", str(run), "--gpu", "a1000"]) == 78
    error = capsys.readouterr().err
    assert "a1000" in error
    assert error.count("\n") == 1


def test_a_rank_without_a_predicted_stage_stands_alone(run: Path) -> None:
    plan = predict_run(read_run(run), run, "cpu").plan
    names = ("pp 0 · dp 0 · tp 0", "pp 1 · dp 0 · tp 0", "the first", "pp", "")
    both = beside_measured(plan, Timeline(2, tuple(RankTimeline(n, "", ()) for n in names)))
    assert [rank.name for rank in both.ranks] == [names[0], PREDICTED, *names[1:]]


def test_metrics_of_another_grid_than_the_config_s(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run / "config.yaml"
    config.write_text(yaml.safe_dump(changed(config, {"data": 2, "tensor": 2})))
    capsys.readouterr()
    assert main(["report", str(run), "--gpu", "cpu"]) == 78
    error = capsys.readouterr().err
    assert f"{run}: its metrics are of 1 ranks, its config.yaml of another grid" in error
    assert "--gpus" not in error
    assert error.count("\n") == 1


def changed(path: Path, parallel: dict[str, Any]) -> dict[str, Any]:
    """A config with keys of `parallel` changed."""
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    return values | {"parallel": values["parallel"] | parallel}


def test_several_recorded_steps_are_drawn_without_the_prediction_of_one(run: Path) -> None:
    record = read_run(run)
    assert record.timeline is not None
    predicted = predict_run(record, run, "cpu")
    (one,) = record.timeline.ranks
    later = [replace(e, begin=e.begin + 10, end=e.end + 10) for e in one.events]
    twice = replace(one, events=(*one.events, *later))
    two = replace(record, timeline=replace(record.timeline, ranks=(twice,)))
    assert predicted.beside(record) is not None
    assert "not drawn" not in predicted.words(record)
    assert predicted.beside(two) is None
    assert predicted.words(two).endswith("several steps were recorded, and one is predicted")
