"""Real processes, real signals: the exit codes that a scheduler sees, and what a kill leaves.

The processes run side by side; each is stopped once its metrics show that it trains.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from megallama.checkpoint.store import Checkpoint, committed_checkpoints
from megallama.cli.main import main
from megallama.train.metrics import read_metrics
from tests.conftest import ConfigFile, losses

MEGALLAMA = [sys.executable, "-c", "from megallama.cli.main import main; raise SystemExit(main())"]
#: The rate is constant, so the length of the run decides no step.
SAVED_EVERY = 3
ENDLESS = {
    "optimizer.schedule": "constant",
    "train.steps": 1_000_000,
    "validation.every": 0,
    "checkpoint.every": SAVED_EVERY,
}


class Ended(NamedTuple):
    code: int
    error: str
    run: Path


Stopped = dict[str, Ended]


def start(name: str, *words: str) -> subprocess.Popen[str]:
    command = [*MEGALLAMA, "train", *words, f"run.name={name}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )


def start_on_terminal(name: str, *words: str) -> tuple[subprocess.Popen[str], int]:
    """The same in the foreground of a terminal, whose other end is returned too."""
    ours, its = os.openpty()

    def take_terminal() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        fcntl.ioctl(its, termios.TIOCSCTTY, 0)

    command = [*MEGALLAMA, "train", *words, f"run.name={name}"]
    # A dumb terminal gets no bar: nobody reads this one, and it would be full.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    process = subprocess.Popen(
        command,
        stdout=its,
        stderr=its,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(its)
    return process, ours


def wait_for_step(process: subprocess.Popen[str], metrics: Path, step: int) -> None:
    while process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= step:
            return
        time.sleep(0.02)


@pytest.fixture
def stopped(config_file: ConfigFile, tmp_path: Path) -> Iterator[Stopped]:
    """How runs end that get a signal after a few steps, lose their terminal, or neither."""
    path = str(config_file(ENDLESS))
    signals = {"sigterm": signal.SIGTERM, "sigint": signal.SIGINT, "sigkill": signal.SIGKILL}
    processes = {name: start(name, path) for name in signals}
    processes["time-box"] = start("time-box", path, "train.max_minutes=1e-9")
    processes["done"] = start("done", path, "train.steps=3")
    processes["hangup"], terminal = start_on_terminal("hangup", path, "log.every=1000000")
    ended = {}
    try:
        for name in (*signals, "hangup"):
            metrics = tmp_path / "runs" / name / "metrics.jsonl"
            wait_for_step(processes[name], metrics, 8)
            if name in signals:
                processes[name].send_signal(signals[name])
            else:
                os.close(terminal)
        for name, process in processes.items():
            _, error = process.communicate()
            ended[name] = Ended(process.returncode, error or "", tmp_path / "runs" / name)
        yield ended
    finally:
        for process in processes.values():
            process.kill()


def newest(run: Path) -> int:
    path = committed_checkpoints(run / "checkpoints")[-1]
    Checkpoint(path).verify()
    return int(path.name.removeprefix("step-"))


def test_a_process_ends_as_documented_and_goes_on_where_it_was(
    stopped: Stopped, config_file: Callable[..., Path]
) -> None:
    codes = {name: ended.code for name, ended in stopped.items()}
    assert codes == {
        "sigterm": 75,
        "sigint": 130,
        "sigkill": -signal.SIGKILL,
        "hangup": 75,
        "time-box": 75,
        "done": 0,
    }
    assert {name: ended.error for name, ended in stopped.items()} == dict.fromkeys(codes, "")
    for name, (_, _, run) in stopped.items():
        rows = [row["step"] for row in read_metrics(run / "metrics.jsonl")]
        assert rows == list(range(1, len(rows) + 1))
        if name == "sigkill":
            # One save is behind the steps at most; of the step before last, one may be due.
            assert len(rows) - 2 * SAVED_EVERY <= newest(run) <= len(rows)
        else:
            assert newest(run) == len(rows)

    last = 3 + max(len(losses(run)) for _, _, run in stopped.values())
    path = str(config_file({**ENDLESS, "train.steps": last}))
    assert main(["train", path, "run.name=straight"]) == 0
    straight = stopped["done"].run.with_name("straight")
    tensors = Path("checkpoints", f"step-{last:08d}", "rank-00000.safetensors")
    for name, (_, _, run) in stopped.items():
        assert main(["train", path, f"run.name={name}"]) == 0
        assert losses(run) == losses(straight), name
        assert (run / tensors).read_bytes() == (straight / tensors).read_bytes(), name
    assert main(["train", path, "run.name=sigterm"]) == 0
