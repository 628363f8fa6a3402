"""A tracker that is missing, fails, hangs or is slow costs the training loop nothing."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megallama.train import trackers
from megallama.train.trackers import Tracker, tracker_values, wandb_tracker

STEP: dict[str, Any] = {
    "step": 3,
    "tokens": 300,
    "loss": 2.5,
    "grad_norm": 0.7,
    "lr": 1e-3,
    "step_seconds": 0.25,
    "tokens_per_second": 400.0,
    "tokens_per_second_per_gpu": 100.0,
    "tflops_per_gpu": 1.5,
    "mfu": None,
    "mfu_6n": None,
    "memory_bytes": 1024,
}


class Recorder:
    """A backend that notes its calls; each of `slow` is run before the call of that name."""

    def __init__(self, **slow: Callable[[], object]) -> None:
        self.slow = slow
        self.logged: list[tuple[dict[str, float], int]] = []
        self.finished = 0

    def log(self, values: dict[str, float], step: int) -> None:
        self.slow.get("log", int)()
        self.logged.append((values, step))

    def finish(self) -> None:
        self.slow.get("finish", int)()
        self.finished += 1


@pytest.fixture
def hang() -> Iterator[threading.Event]:
    """An event to wait on: a hang that ends with the test."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def threads() -> Callable[[], list[threading.Thread]]:
    """The tracker threads that this test started."""
    before = set(threading.enumerate())
    return lambda: [t for t in set(threading.enumerate()) - before if t.name == "tracker"]


def fail() -> None:
    raise ValueError("no\nroute to host")


def row(step: int) -> dict[str, Any]:
    return {"step": step, "loss": float(step)}


def test_rows_arrive_in_order_and_the_backend_is_finished() -> None:
    backend, warnings = Recorder(), []
    tracker = Tracker(lambda: backend, warn=warnings.append)
    for step in range(1, 6):
        tracker.step(row(step))
    tracker.validation({"step": 5, "validation_loss": 4.5})
    assert tracker.close()
    assert [step for _, step in backend.logged] == [1, 2, 3, 4, 5, 5]
    assert backend.logged[-1] == ({"lm loss validation": 4.5}, 5)
    assert (backend.finished, tracker.dropped, tracker.failed, warnings) == (1, 0, 0, [])


def test_columns_go_under_megatrons_names() -> None:
    own = {"tokens": 300, "tokens_per_second": 400, "tokens_per_second_per_gpu": 100}
    assert tracker_values(STEP) == {
        "lm loss": 2.5,
        "grad-norm": 0.7,
        "learning-rate": 1e-3,
        "throughput": 1.5,
        "iteration-time": 0.25,
        "memory_bytes": 1024,
        **own,
    }


def test_every_megatron_name_comes_against_samples_too() -> None:
    values = tracker_values({**STEP, "validation_loss": 2.6}, samples=48)
    names = "lm loss|grad-norm|learning-rate|throughput|iteration-time|lm loss validation"
    for name in names.split("|"):
        assert values[f"{name} vs samples"] == values[name]
    assert values["samples"] == 48
    assert sum(name.endswith(" vs samples") for name in values) == 6


def test_losses_by_source_are_named_by_source() -> None:
    values = tracker_values(
        {"step": 1, "loss_per_source": {"web": 2.0}, "validation_loss_per_source": {"web": 3.0}}
    )
    assert values == {"lm loss/web": 2.0, "lm loss validation/web": 3.0}


def test_a_backend_that_does_not_start_gives_one_warning_and_is_off() -> None:
    warnings: list[str] = []
    tracker = Tracker(fail, queue_size=2, warn=warnings.append)  # type: ignore[arg-type]
    wait_until(lambda: warnings)
    for step in range(10):
        tracker.step(row(step))
    assert tracker.close()
    assert tracker.dropped == 0
    assert warnings == [
        "warning: the tracker is off, it failed to start: ValueError: no route to host;"
        " training goes on"
    ]


def test_a_backend_that_fails_to_log_gives_one_warning_and_is_still_finished() -> None:
    backend, warnings = Recorder(log=fail), []
    tracker = Tracker(lambda: backend, warn=warnings.append)
    for step in range(1, 6):
        tracker.step(row(step))
    assert tracker.close()
    assert (tracker.failed, backend.finished) == (5, 1)
    assert len(warnings) == 1
    assert "step 1: ValueError: no route to host" in warnings[0]


def test_one_failed_row_does_not_end_tracking() -> None:
    calls: list[int] = []

    def fail_once() -> None:
        calls.append(1)
        if len(calls) == 2:
            fail()

    backend = Recorder(log=fail_once)
    tracker = Tracker(lambda: backend, warn=lambda _: None)
    for step in range(1, 5):
        tracker.step(row(step))
    assert tracker.close()
    assert [step for _, step in backend.logged] == [1, 3, 4]


def test_a_backend_that_fails_to_finish_gives_one_warning() -> None:
    warnings: list[str] = []
    assert Tracker(lambda: Recorder(finish=fail), warn=warnings.append).close()
    assert len(warnings) == 1
    assert "failed to finish: ValueError" in warnings[0]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_a_backend_that_hangs_is_left_behind(where: str, hang: threading.Event) -> None:
    warnings: list[str] = []

    def make() -> Recorder:
        if where == "init":
            hang.wait()
        return Recorder(**{where: hang.wait})

    tracker = Tracker(make, queue_size=5, warn=warnings.append)
    for step in range(4):
        tracker.step(row(step))
    assert not tracker.close(timeout=0.2)
    assert warnings == [
        "warning: the tracker did not finish within 0.2 s and was left behind; training goes on"
    ]
    tracker.step(row(9))  # after close: ignored
    assert tracker.close(timeout=0.2)  # a second close has nothing to do


def test_a_full_queue_drops_counts_and_never_blocks(hang: threading.Event) -> None:
    warnings: list[str] = []
    started = threading.Event()

    def wait() -> None:
        started.set()
        hang.wait()

    backend = Recorder(log=wait)
    tracker = Tracker(lambda: backend, queue_size=3, warn=warnings.append)
    tracker.step(row(0))
    assert started.wait(5)  # row 0 is out of the queue
    for step in range(1, 11):
        tracker.step(row(step))
    assert tracker.dropped == 7
    assert not tracker.close(timeout=0.1)
    assert len(warnings) == 1
    assert "rows are dropped" in warnings[0]


def test_a_backend_that_comes_back_takes_what_was_kept(hang: threading.Event) -> None:
    backend = Recorder(log=hang.wait)
    tracker = Tracker(lambda: backend, queue_size=3, warn=lambda _: None)
    for step in range(20):
        tracker.step(row(step))
    hang.set()
    assert tracker.close()
    assert len(backend.logged) == 20 - tracker.dropped
    assert backend.finished == 1


def test_the_thread_is_a_daemon(threads: Callable[[], list[threading.Thread]]) -> None:
    tracker = Tracker(Recorder)
    assert [thread.daemon for thread in threads()] == [True]
    assert tracker.close()
    assert threads() == []


def test_off_starts_nothing(tmp_path: Path, threads: Callable[[], list[threading.Thread]]) -> None:
    tracker = wandb_tracker("off", tmp_path)
    assert threads() == []
    tracker.step(STEP)
    tracker.validation({"step": 3, "validation_loss": 1.0})
    assert tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_warnings_go_to_stderr_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    Tracker(fail).close()  # type: ignore[arg-type]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("warning: the tracker is off")


def test_a_missing_wandb_gives_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes `import wandb` raise ImportError
    warnings: list[str] = []
    tracker = wandb_tracker("offline", tmp_path, warn=warnings.append)
    tracker.step(STEP)
    assert tracker.close()
    assert len(warnings) == 1
    assert "pip install wandb" in warnings[0]


def test_online_without_a_key_does_not_ask_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    warnings: list[str] = []
    tracker = wandb_tracker("online", tmp_path, warn=warnings.append)
    assert tracker.close()
    assert len(warnings) == 1
    assert "WANDB_API_KEY is not set" in warnings[0]
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_keeps_its_id(tmp_path: Path) -> None:
    first = trackers._run_id(tmp_path)
    assert len(first) == 8
    assert trackers._run_id(tmp_path) == first
    assert trackers._run_id(tmp_path / "other") != first


def test_wandb_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_DIR", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    warnings: list[str] = []
    tracker = wandb_tracker(
        "offline", tmp_path, name="demo", config={"model": {"layers": 2}}, warn=warnings.append
    )
    tracker.step(STEP, samples=12)
    tracker.validation({"step": 3, "validation_loss": 2.6}, samples=12)
    assert tracker.close(timeout=60)
    assert (warnings, tracker.failed) == ([], 0)
    (record,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = record.read_bytes()
    for name in ("lm loss", "grad-norm", "learning-rate vs samples", "lm loss validation"):
        assert name.encode() in content
    assert capfd.readouterr() == ("", "")


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
