"""Saving behind the steps: what is saved, what waits for what, and that a failure costs no run."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megallama.checkpoint.store import Checkpoint, checkpoint_path, committed_checkpoints
from megallama.config.schema import Config
from megallama.errors import ConfigError, LostError, UserError
from megallama.files import Disk
from megallama.train import saver
from megallama.train.build import build_dataset, build_trainer
from megallama.train.console import Console
from megallama.train.job import train
from megallama.train.meeting import Meeting
from megallama.train.metrics import Row, read_metrics
from megallama.train.process import ALONE
from megallama.train.saver import HostCopy, Saver
from megallama.train.snapshot import Progress, rectangles, snapshot
from tests.chaos.disks import Counting, refusing
from tests.conftest import MakeConfig, losses

WRITTEN = "rank-00000.safetensors"


def folder_of(config: Config) -> Path:
    return config.run.directory / "checkpoints"


def steps_saved(config: Config) -> list[int]:
    paths = committed_checkpoints(folder_of(config))
    for path in paths:
        Checkpoint(path).verify()
    return [int(path.name[5:]) for path in paths]


def content(config: Config, step: int) -> bytes:
    return (checkpoint_path(folder_of(config), step) / WRITTEN).read_bytes()


@pytest.fixture
def use_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[Disk], None]:
    """Makes the runs of the test save through this disk."""
    real = Saver.__init__

    def arrange(disk: Disk) -> None:
        def made(self: Saver, *arguments: Any) -> None:
            real(self, *arguments, disk=disk)

        monkeypatch.setattr(Saver, "__init__", made)

    return arrange


class Slow(Disk):
    """A disk that answers once it may."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.at_once, self.most = 0, 0

    def sync(self, descriptor: int) -> None:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        assert self.may.wait(30), "the steps wait for the disk"
        super().sync(descriptor)
        self.at_once -= 1


def test_steps_go_on_while_the_disk_is_slow_and_what_is_saved_is_the_step_s(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, use_disk: Callable[[Disk], None]
) -> None:
    """The disk answers only after step 5 is shown; the file is that of a run that waits."""
    keep = {"checkpoint.keep": 3}
    waiting = make_config({**keep, "run.name": "waiting", "checkpoint.asynchronous": False})
    assert train(waiting) == 0
    disk, shown = Slow(), Console.step

    def show(console: Console, row: Row) -> None:
        shown(console, row)
        if row["step"] == 5:
            disk.may.set()

    monkeypatch.setattr(Console, "step", show)
    use_disk(disk)
    config = make_config(keep)
    assert train(config) == 0
    assert steps_saved(config) == steps_saved(waiting) == [3, 6]
    for step in (3, 6):
        assert content(config, step) == content(waiting, step)
    assert losses(config.run.directory) == losses(waiting.run.directory)


def test_a_run_that_waits_for_the_disk_would_stop_there(
    make_config: MakeConfig, use_disk: Callable[[Disk], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test above can fail."""
    disk = Slow()
    monkeypatch.setattr(disk.may, "wait", lambda seconds: False)
    use_disk(disk)
    with pytest.raises(AssertionError, match="the steps wait"):
        train(make_config({"checkpoint.asynchronous": False}))


def test_a_second_save_waits_for_the_first(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, use_disk: Callable[[Disk], None]
) -> None:
    disk, shown = Slow(), Console.step

    def show(console: Console, row: Row) -> None:
        shown(console, row)
        if row["step"] == 2:  # its save waits for the one of step 1
            threading.Timer(0.1, disk.may.set).start()

    monkeypatch.setattr(Console, "step", show)
    use_disk(disk)
    config = make_config({"checkpoint.every": 1, "checkpoint.keep": 9})
    assert train(config) == 0
    assert disk.most == 1
    assert steps_saved(config) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_failed_save_is_reported_and_the_run_goes_on(
    make_config: MakeConfig,
    use_disk: Callable[[Disk], None],
    capsys: pytest.CaptureFixture[str],
    code: int,
    asynchronous: bool,
) -> None:
    """The second of three saves: its file's sync, after two of the first one."""
    changes = {"checkpoint.every": 2, "checkpoint.asynchronous": asynchronous}
    straight = make_config({**changes, "run.name": "straight"})
    assert train(straight) == 0
    capsys.readouterr()
    use_disk(refusing("sync", 3, code))
    config = make_config(changes)
    assert train(config) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "no checkpoint" in line]
    (line,) = lines
    assert line.startswith("no checkpoint of step 4: cannot write ")
    assert os.strerror(code) in line
    assert steps_saved(config) == [2, 6]
    assert sorted(path.name for path in folder_of(config).iterdir()) == [
        "step-00000002",
        "step-00000006",
    ]
    rows = read_metrics(config.run.directory / "metrics.jsonl")
    (row,) = [row for row in rows if "failed_save" in row]
    assert row["failed_save"]["step"] == 4
    assert os.strerror(code) in row["failed_save"]["reason"]
    assert row["step"] in (4, 5, 6)
    kept = [row for row in losses(config.run.directory) if "failed_save" not in dict(row)]
    assert kept == losses(straight.run.directory)
    assert content(config, 6) == content(straight, 6)


@pytest.mark.parametrize(
    "code, kind", [(errno.EIO, LostError), (errno.ENOSPC, ConfigError), (errno.EDQUOT, ConfigError)]
)
@pytest.mark.parametrize("every", [0, 3])
def test_a_last_save_that_fails_ends_the_run_with_its_code(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    kind: type[UserError],
    every: int,
) -> None:
    """Behind the steps it is tried once more; that fails too."""
    config, real = make_config({"checkpoint.every": every}), Disk.sync

    def full(disk: Disk, descriptor: int) -> None:
        if checkpoint_path(folder_of(config), 6).exists():
            raise OSError(code, os.strerror(code))
        real(disk, descriptor)

    monkeypatch.setattr(Disk, "sync", full)
    with pytest.raises(kind, match=rf"step-00000006.*{os.strerror(code)}"):
        train(config)
    assert steps_saved(config) == ([3] if every else [])
    monkeypatch.undo()
    assert train(config) == 0
    assert steps_saved(config)[-1] == 6


def test_a_last_save_that_failed_once_is_tried_again(
    make_config: MakeConfig, use_disk: Callable[[Disk], None], capsys: pytest.CaptureFixture[str]
) -> None:
    use_disk(refusing("sync", 3, errno.ENOSPC))
    config = make_config()
    assert train(config) == 0
    assert "no checkpoint of step 6: cannot write" in capsys.readouterr().out
    assert steps_saved(config) == [3, 6]


def test_a_save_without_room_is_left_out_in_one_line(
    make_config: MakeConfig,
    use_disk: Callable[[Disk], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With one to keep, and no room for two, the one stays."""

    class Small(Disk):
        saves = 0

        def free_bytes(self, directory: Path) -> int:
            self.saves += 1
            return 2**40 if self.saves != 2 else 0

    use_disk(Small())
    config = make_config({"checkpoint.every": 2, "checkpoint.keep": 1, "train.steps": 5})
    assert train(config) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "no checkpoint" in x]
    assert "and the disk has 0.00 GiB; free some, or lower checkpoint.keep" in line
    assert steps_saved(config) == [5]


def test_the_room_asked_for_is_about_what_a_save_takes(make_config: MakeConfig) -> None:
    config = make_config({"model.d_model": 256, "model.ffn": 1024})
    trainer, dataset = build_trainer(config), build_dataset(config)
    progress = Progress(step=1)
    asked = snapshot(trainer, progress, dataset).bytes
    Saver(trainer, dataset, Meeting(ALONE), None).save_last(progress)
    taken = sum(f.stat().st_size for f in checkpoint_path(folder_of(config), 1).iterdir())
    assert 0.9 * asked < taken <= asked


def test_old_ones_that_cannot_be_deleted_are_a_warning(
    make_config: MakeConfig, use_disk: Callable[[Disk], None], capsys: pytest.CaptureFixture[str]
) -> None:
    use_disk(refusing("unlink", 1, errno.EACCES))
    config = make_config({"checkpoint.every": 2, "checkpoint.keep": 1})
    assert train(config) == 0
    out = capsys.readouterr().out
    assert "cannot delete old checkpoints in" in out
    assert "no checkpoint" not in out
    assert steps_saved(config) == [6]


def test_multiples_are_kept_for_ever(make_config: MakeConfig) -> None:
    config = make_config(
        {"checkpoint.every": 1, "checkpoint.keep": 1, "checkpoint.keep_every": 2, "train.steps": 5}
    )
    assert train(config) == 0
    assert steps_saved(config) == [2, 4, 5]


def test_an_error_of_ours_in_the_thread_is_not_swallowed(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(saver, "write_snapshot", broken)
    with pytest.raises(ZeroDivisionError):
        train(make_config())


def test_the_host_copy_is_the_state_and_is_used_again(make_config: MakeConfig) -> None:
    trainer = build_trainer(make_config())
    views = rectangles(trainer)
    copy = HostCopy(views, pinned=False)
    assert copy.bytes >= sum(view.data.nbytes for view in views)
    assert copy.bytes < sum(view.data.nbytes + 64 for view in views)
    places = set()
    for value in (1.5, 2.5):
        for view in views:
            view.data.fill_(value)
        taken = copy.take(views)
        for view in views:
            view.data.fill_(0)
        assert all((one.data == value).all() for one in taken)
        places.add(tuple(one.data.data_ptr() for one in taken))
        assert [(t.name, t.start, t.shape) for t in taken] == [
            (v.name, v.start, v.shape) for v in views
        ]
    assert len(places) == 1


def test_no_host_memory_for_the_copy_is_said_before_training(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.empty

    def empty(*size: Any, **named: Any) -> torch.Tensor:
        if "pin_memory" in named:
            raise RuntimeError("cannot allocate")
        return real(*size, **named)

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(ConfigError, match=r"checkpoint\.asynchronous: no host memory.*false"):
        train(make_config())
    assert train(make_config({"checkpoint.asynchronous": False})) == 0


def test_a_run_that_saves_at_its_end_only_keeps_no_copy(
    make_config: MakeConfig, use_disk: Callable[[Disk], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "HostCopy", None)
    disk = Counting()
    use_disk(disk)
    assert train(make_config({"checkpoint.every": 0})) == 0
    assert disk.calls["rename"] == 1


class Ordered(Disk):
    """Writes down which log was synced when, beside what commits a checkpoint."""

    def __init__(self) -> None:
        self.log = -1
        self.synced: list[int] = []  # rows that are on the disk
        self.commits: list[tuple[str, int]] = []  # a checkpoint, and how many were by then

    def open_log(self, path: Path) -> int:
        self.log = super().open_log(path)
        return self.log

    def sync_log(self, descriptor: int) -> None:
        self.synced.append(os.pread(self.log, 1 << 20, 0).count(b'"grad_norm"'))
        super().sync_log(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        self.commits.append((target.parent.name, self.synced[-1]))
        super().rename(source, target)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_rows_of_saved_steps_are_on_the_disk_before_the_checkpoint(
    make_config: MakeConfig, use_disk: Callable[[Disk], None], asynchronous: bool
) -> None:
    """A power failure would lose them, and a run that goes on from there writes them no more."""
    disk = Ordered()
    use_disk(disk)
    assert train(make_config({"checkpoint.asynchronous": asynchronous})) == 0
    assert [name for name, _ in disk.commits] == ["step-00000003", "step-00000006"]
    assert all(rows >= int(name[5:]) for name, rows in disk.commits)


def test_rows_that_cannot_be_synced_cost_no_save(
    make_config: MakeConfig, use_disk: Callable[[Disk], None], capsys: pytest.CaptureFixture[str]
) -> None:
    use_disk(refusing("sync_log", 1, errno.EIO))
    config = make_config({"checkpoint.keep": 9})
    assert train(config) == 0
    assert steps_saved(config) == [3, 6]
    path = config.run.directory / "metrics.jsonl"
    assert f"cannot sync {path}: {os.strerror(errno.EIO)}; a power" in capsys.readouterr().out
