"""What a run watches: a stop-file, another writer, damage; what ends it, and what is saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megallama.checkpoint.store import committed_checkpoints
from megallama.config.schema import Config
from megallama.errors import ConfigError, LostError
from megallama.files import Disk
from megallama.train.build import build_trainer
from megallama.train.console import Console
from megallama.train.guard import Guard
from megallama.train.job import train
from megallama.train.lease import LEASE, Lease, this_process
from megallama.train.meeting import Meeting
from megallama.train.metrics import Row
from megallama.train.process import ALONE
from megallama.train.saver import Saver
from megallama.train.signals import StopFile
from tests.conftest import MakeConfig


def saved(config: Config) -> list[str]:
    return [p.name for p in committed_checkpoints(config.run.directory / "checkpoints")]


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Does something just after a step's row was written."""
    shown = Console.step

    def arrange(step: int, do: Callable[[], object]) -> None:
        def show(console: Console, row: Row) -> None:
            shown(console, row)
            if row["step"] == step:
                do()

        monkeypatch.setattr(Console, "step", show)

    return arrange


def test_a_stop_file_is_heard_saved_and_removed(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, after_step: Callable[..., None]
) -> None:
    monkeypatch.setattr(StopFile, "SECONDS", 1e-6)
    config = make_config()
    stop = config.run.directory / "stop"
    after_step(2, stop.touch)
    assert train(config) == 130
    assert saved(config) == ["step-00000002"]
    assert not stop.exists()
    assert train(config) == 0


def test_a_stop_file_is_looked_for_now_and_then(tmp_path: Path) -> None:
    stop = StopFile(tmp_path)
    assert not stop.asked()
    stop.path.touch()
    assert not stop.asked(), "within a second"
    stop._next = 0.0
    assert stop.asked()
    assert stop.asked(), "whoever asks again hears the same"
    stop.heard()
    stop.heard()
    assert not StopFile(tmp_path).asked()


def test_a_second_writer_is_refused_and_touches_nothing(make_config: MakeConfig) -> None:
    config = make_config()
    lease = Lease(config.run.directory, this_process({"SLURM_JOB_ID": "17"}))
    lease.take()
    try:
        with pytest.raises(ConfigError, match=r"job 17, process \d+ on .* writes there"):
            train(config)
        assert [path.name for path in config.run.directory.iterdir()] == [LEASE]
    finally:
        lease.release()
    assert train(config) == 0
    assert not (config.run.directory / LEASE).exists()


def test_a_run_that_was_taken_over_ends_unsaved(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, after_step: Callable[..., None]
) -> None:
    config = make_config({"checkpoint.every": 2, "checkpoint.asynchronous": False})
    other = replace(this_process({}), host="n7", machine="other")

    def take_over() -> None:
        (config.run.directory / LEASE).write_text(json.dumps(asdict(other)))
        monkeypatch.setattr(Lease, "replaced", True)  # as the next renewal would find

    after_step(3, take_over)
    with pytest.raises(ConfigError, match="on n7 writes there"):
        train(config)
    assert saved(config) == ["step-00000002"]
    assert json.loads((config.run.directory / LEASE).read_text())["host"] == "n7"


def test_damage_ends_a_run_unsaved(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone under bf16, a rank's weights are compared with its own masters."""
    config = make_config({"train.precision": "bf16", "checkpoint.every": 2})
    alarms = Guard.alarms

    def flipped(guard: Guard, step: int) -> tuple[bool, bool]:
        if step == 4:
            guard.replicas.state.weights["layers.1.wo"].view(-1)[3] += 1
        return alarms(guard, step)

    monkeypatch.setattr(Guard, "alarms", flipped)
    with pytest.raises(LostError, match=r"step 4: rank 0 \(host .*\): the weight layers\.1\.wo"):
        train(config)
    assert saved(config) == ["step-00000002"]
    monkeypatch.undo()
    assert train(config) == 0


@pytest.mark.parametrize(
    "changes, steps",
    [
        ({}, [1, 2, 3, 4, 5, 6]),
        ({"train.check_replicas_every": 4}, [3, 4, 6]),  # each save's, too
        ({"train.check_replicas_every": 0}, []),
    ],
)
def test_when_replicas_are_compared(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, changes: dict, steps: list[int]
) -> None:
    config = make_config(changes)
    guard = Guard(build_trainer(config), Meeting(ALONE), None, print)
    seen: list[int] = []
    for step in range(1, 7):
        monkeypatch.setattr(guard.replicas, "compare", lambda step=step: bool(seen.append(step)))
        guard.alarms(step)
    assert seen == steps


class TakenOver(Disk):
    """While one operation of a save is under way another job takes the run's directory over, and
    saves the same step, as a process that sleeps meanwhile finds it."""

    def __init__(self, directory: Path, theirs: Path, kind: str, call: int) -> None:
        self.directory, self.theirs, self.calls = directory, theirs, 0
        real = getattr(super(), kind)

        def wake(*arguments: Any) -> Any:
            self.calls += 1
            if self.calls == call:
                self.take_over()
            return real(*arguments)

        setattr(self, kind, wake)

    def take_over(self) -> None:
        other = replace(this_process({}), host="n7", machine="other")
        (self.directory / LEASE).write_text(json.dumps(asdict(other)))
        for path in self.theirs.iterdir():
            shutil.rmtree(self.directory / "checkpoints" / path.name, ignore_errors=True)
            shutil.copytree(path, self.directory / "checkpoints" / path.name)


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(
    "kind, call",
    [
        ("mkdir", 2),  # after it was seen to that no other one writes
        ("create", 3),
        ("append", 4),
        ("sync", 3),
        ("forget", 2),
        ("sync_names", 6),  # the last before older ones are deleted
    ],
)
def test_who_is_taken_over_in_a_save_leaves_the_other_s_alone(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    call: int,
    asynchronous: bool,
) -> None:
    """Steps 2, 4 and 6 are saved and the last kept; it happens at step 4."""
    saves = {"checkpoint.every": 2, "checkpoint.keep": 1}
    other = make_config({**saves, "run.name": "other", "checkpoint.keep": 9, "run.seed": 7})
    assert train(other) == 0
    config = make_config({**saves, "checkpoint.asynchronous": asynchronous})
    folder, theirs = (c.run.directory / "checkpoints" for c in (config, other))
    disk, real = TakenOver(config.run.directory, theirs, kind, call), Saver.__init__

    def made(saver: Saver, *arguments: Any, **named: Any) -> None:
        real(saver, *arguments, **{**named, "disk": disk})

    monkeypatch.setattr(Saver, "__init__", made)
    with pytest.raises(ConfigError, match="on n7 writes there"):
        train(config)
    assert disk.calls >= call
    for path in theirs.iterdir():
        found = {file.name: file.read_bytes() for file in (folder / path.name).iterdir()}
        assert found == {file.name: file.read_bytes() for file in path.iterdir()}
