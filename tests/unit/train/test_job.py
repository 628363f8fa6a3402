"""A whole job: where it begins, how it ends, and that it can be started again."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megallama.checkpoint.store import committed_checkpoints
from megallama.config.schema import Config
from megallama.errors import ConfigError
from megallama.train import agree, job
from megallama.train.job import train
from megallama.train.loop import Loop
from megallama.train.metrics import read_metrics
from tests.conftest import MakeConfig


def files(config: Config) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in config.run.directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_a_stopped_job_says_how_and_has_saved(
    make_config: MakeConfig, signal_at: Callable[..., None], number: signal.Signals, code: int
) -> None:
    config = make_config()
    before = signal.getsignal(number)
    signal_at(2, number)
    assert train(config) == code
    (saved,) = committed_checkpoints(config.run.directory / "checkpoints")
    assert saved.name == "step-00000002"
    assert signal.getsignal(number) == before


def test_a_finished_run_may_be_started_again(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    assert train(config) == 0
    before = files(config)
    stamps = {path: path.stat().st_mtime_ns for path in before if "checkpoints" in path.parts}
    capsys.readouterr()
    assert train(config) == 0
    assert "step 6 of 6" in (out := capsys.readouterr().out)
    assert "nothing left to train" in out
    assert files(config) == before
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps  # not even written again


def test_a_run_shorter_than_its_checkpoint_has_nothing_left(make_config: MakeConfig) -> None:
    assert train(make_config()) == 0
    shorter = make_config({"train.steps": 4})
    assert train(shorter) == 0
    folder = shorter.run.directory / "checkpoints"
    assert [path.name for path in committed_checkpoints(folder)] == [
        "step-00000003",
        "step-00000006",
    ]


def test_none_is_a_new_run_and_refuses_one_that_has_checkpoints(make_config: MakeConfig) -> None:
    config = make_config()
    assert train(config, "none") == 0
    before = files(config)
    with pytest.raises(ConfigError, match=r"--resume none: .*tiny already holds checkpoints"):
        train(config, "none")
    assert files(config) == before


def test_none_begins_anew_where_no_checkpoint_was_saved(make_config: MakeConfig) -> None:
    config = make_config({"checkpoint.every": 0})
    config.run.directory.mkdir(parents=True)
    (config.run.directory / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    assert train(config, "none") == 0
    rows = read_metrics(config.run.directory / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert 9.0 not in [row.get("loss") for row in rows]


def test_a_missing_or_empty_path_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    with pytest.raises(ConfigError, match="nowhere: no such checkpoint directory"):
        train(config, str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="neither a checkpoint nor a run"):
        train(config, str(tmp_path))
    assert not config.run.directory.exists()


def test_signals_that_come_before_the_first_step_are_heard(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = agree.build_dataset

    def build_dataset(config: Config) -> object:
        signal.raise_signal(signal.SIGTERM)
        return real(config)

    monkeypatch.setattr(agree, "build_dataset", build_dataset)
    config = make_config()
    assert train(config) == 75
    assert committed_checkpoints(config.run.directory / "checkpoints")


def test_a_second_ctrl_c_does_not_wait_for_the_end_of_the_step(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(loop: Loop, requests: object) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one was not heard")

    monkeypatch.setattr(Loop, "_step", step)
    config = make_config()
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert committed_checkpoints(config.run.directory / "checkpoints") == []


def test_emulated_bf16_is_said(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(job, "bf16_is_emulated", lambda device: True)
    config = make_config({"train.steps": 1, "run.name": "a"})
    assert train(config) == 0
    assert "no bf16 units" not in capsys.readouterr().out
    assert train(make_config({"train.steps": 1, "train.precision": "bf16"})) == 0
    assert "no bf16 units" in capsys.readouterr().out
