"""One live writer a run directory: who is refused, who takes over, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megallama.errors import ConfigError
from megallama.train import lease as module
from megallama.train.lease import LEASE, MISSED, Holder, Lease, this_process

FAST = 0.05  # seconds from one renewal to the next


@pytest.fixture
def leases() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def held(stack: ExitStack, directory: Path, holder: Holder, **options: object) -> Lease:
    lease = Lease(directory, holder, **options)
    lease.take()
    stack.callback(lease.release)
    return lease


def me(interval: float = FAST, **others: object) -> Holder:
    return replace(this_process({}, interval), **others)


def written(directory: Path) -> dict:
    return json.loads((directory / LEASE).read_text())


def write(directory: Path, holder: Holder) -> None:
    directory.mkdir(exist_ok=True)
    (directory / LEASE).write_text(json.dumps(asdict(holder)))


@pytest.fixture
def gone() -> Holder:
    """A process of this machine that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    holder = me(pid=process.pid, started=module._started(process.pid))
    process.wait()
    return holder


def test_it_names_the_writer_and_goes_with_it(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    lease = Lease(directory, this_process({"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "2"}))
    lease.take()
    found = written(directory)
    assert (found["pid"], found["job"], found["restarts"]) == (os.getpid(), "17", 2)
    assert found["host"] == os.uname().nodename
    lease.check()
    lease.release()
    assert not directory.exists()


def test_a_directory_with_something_in_it_stays(tmp_path: Path) -> None:
    with ExitStack() as stack:
        held(stack, tmp_path, me())
        (tmp_path / "config.yaml").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_live_one_of_this_machine_is_named_at_once(tmp_path: Path, leases: ExitStack) -> None:
    held(leases, tmp_path, replace(this_process({"SLURM_JOB_ID": "17"}), token="first"))
    other = Lease(tmp_path, this_process({"SLURM_JOB_ID": "18"}))
    began = time.monotonic()
    with pytest.raises(ConfigError, match=rf"job 17, process {os.getpid()} on .*run\.name"):
        other.take()
    assert time.monotonic() - began < 5, "there is nothing to wait for"
    other.release()
    assert written(tmp_path)["token"] == "first"


def test_a_stopped_process_is_alive(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        os.kill(process.pid, signal.SIGSTOP)
        write(tmp_path, me(pid=process.pid, started=module._started(process.pid)))
        with pytest.raises(ConfigError, match=f"process {process.pid} "):
            Lease(tmp_path, me()).take()
    finally:
        process.kill()
        process.communicate()


def test_one_that_is_gone_is_taken_over_at_once(
    tmp_path: Path, leases: ExitStack, gone: Holder
) -> None:
    write(tmp_path, replace(gone, interval=1000.0))
    said: list[str] = []
    lease = held(leases, tmp_path, me(), say=said.append)
    assert written(tmp_path)["token"] == lease.holder.token
    assert said == [f"took over from {gone}, which is gone"]


def test_the_number_of_another_process_is_not_the_process(
    tmp_path: Path, leases: ExitStack
) -> None:
    write(tmp_path, me(started=1))
    held(leases, tmp_path, me())


def test_a_silent_one_elsewhere_is_waited_for(tmp_path: Path, leases: ExitStack) -> None:
    """Whatever its clock says: here it is ahead by an hour."""
    write(tmp_path, me(machine="other", host="n7", time=time.time() + 3600))
    began = time.monotonic()
    held(leases, tmp_path, me())
    assert time.monotonic() - began >= MISSED * FAST


def test_a_live_one_elsewhere_is_found_out(tmp_path: Path) -> None:
    """Whatever its clock says: here it is a day behind."""
    behind = me(machine="other", host="n7", time=time.time() - 86400)
    write(tmp_path, behind)
    later = replace(behind, renewals=1)
    timer = threading.Timer(2 * FAST, write, (tmp_path, later))
    timer.start()
    with pytest.raises(ConfigError, match="on n7 writes there"):
        Lease(tmp_path, me()).take()
    timer.join()
    assert written(tmp_path)["renewals"] == 1


def test_one_elsewhere_that_ends_is_followed(tmp_path: Path, leases: ExitStack) -> None:
    write(tmp_path, me(machine="other", interval=1000.0))
    timer = threading.Timer(0.1, (tmp_path / LEASE).unlink)
    timer.start()
    held(leases, tmp_path, me())
    timer.join()


@pytest.mark.parametrize("job, restarts, taken", [("17", 1, True), ("17", 0, False)])
def test_a_requeued_job_follows_itself(
    tmp_path: Path, leases: ExitStack, job: str, restarts: int, taken: bool
) -> None:
    """SLURM ended the first before it started the second, on whatever machine."""
    write(tmp_path, me(job="17", restarts=0, machine="other", interval=FAST))
    said: list[str] = []
    held(leases, tmp_path, me(job=job, restarts=restarts), say=said.append)
    assert ("watching" in " ".join(said)) != taken


@pytest.mark.parametrize(
    "first, second, follows",
    [
        ("7.0.1", "7.0.2", True),
        ("7.0.9", "7.0.10", True),
        ("7.0.3", "7.1.1", True),
        ("7.0.2", "7.0.2", False),
        ("7.0.2", "7.0.1", False),
        ("7.1.1", "7.0.2", False),
        ("7.0.1", "8.0.2", False),
    ],
)
def test_a_relaunch_in_the_same_allocation_follows_the_attempt_before(
    tmp_path: Path, leases: ExitStack, first: str, second: str, follows: bool
) -> None:
    """Which may be alive: a process that waits for a dead disk cannot be killed."""

    def holder(attempt: str) -> Holder:
        job, restarts, _ = attempt.split(".")
        environ = {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": restarts}
        return this_process({**environ, "ATTEMPT": f"/runs/slurm/{attempt}"}, 1000.0)

    old = held(leases, tmp_path, holder(first))
    new = Lease(tmp_path, holder(second))
    if follows:
        new.take()
        leases.callback(new.release)
    else:
        with pytest.raises(ConfigError, match="writes there"):
            new.take()
    with pytest.raises(ConfigError) if follows else nullcontext():
        old.check()


@pytest.mark.parametrize("attempt", ["", "3", "/x/7.0.", "/x/7.0.x", "/x/8.0.3", "a.b.c"])
def test_an_attempt_of_others_is_none(attempt: str) -> None:
    assert this_process({"SLURM_JOB_ID": "7", "ATTEMPT": attempt}).attempt == 0
    assert this_process({"ATTEMPT": attempt}).attempt == 0


def test_it_is_renewed(tmp_path: Path, leases: ExitStack) -> None:
    held(leases, tmp_path, me())
    deadline = time.monotonic() + 30
    while written(tmp_path)["renewals"] < 4:
        assert time.monotonic() < deadline
        time.sleep(FAST)


def test_who_was_replaced_learns_of_it_and_leaves_the_file_alone(
    tmp_path: Path, leases: ExitStack
) -> None:
    """A machine that slept for minutes comes back."""
    lease = held(leases, tmp_path, me())
    other = me(host="n7", machine="other", renewals=3)
    write(tmp_path, other)
    with pytest.raises(ConfigError, match="on n7 writes there"):
        lease.check()
    time.sleep(4 * FAST)
    lease.release()
    assert written(tmp_path) == asdict(other)


@pytest.mark.parametrize("slept", [True, False])
def test_a_file_that_is_gone_was_another_s_where_this_one_slept(
    tmp_path: Path, leases: ExitStack, slept: bool
) -> None:
    """That one took over, and ended. Where nobody had the time for it, somebody removed it."""
    lease = held(leases, tmp_path, me(interval=1000.0))
    (tmp_path / LEASE).unlink()
    if slept:
        lease.holder = replace(lease.holder, time=lease.holder.time - 10_000)
        with pytest.raises(ConfigError, match=r"another job .*start it again"):
            lease.check()
        assert lease.replaced
    else:
        lease.check()
        assert not lease.replaced


@pytest.mark.parametrize("stale", [True, False])
def test_of_several_that_begin_at_once_one_stays(tmp_path: Path, gone: Holder, stale: bool) -> None:
    for _ in range(5):
        if stale:
            write(tmp_path, gone)
        start = threading.Barrier(4)
        leases = [Lease(tmp_path, me(interval=1000.0)) for _ in range(4)]
        lost: list[ConfigError] = []

        def take(lease: Lease, start: threading.Barrier = start, lost: list = lost) -> None:
            start.wait()
            try:
                lease.take()
            except ConfigError as error:
                lost.append(error)

        threads = [threading.Thread(target=take, args=(lease,)) for lease in leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stay = [lease for lease in leases if may_write(lease)]
        assert len(stay) == 1
        assert written(tmp_path)["token"] == stay[0].holder.token
        for lease in leases:
            lease.release()
        assert not tmp_path.exists()


def may_write(lease: Lease) -> bool:
    try:
        lease.check()
    except ConfigError:
        return False
    return lease._held


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "n7"}'])
def test_an_unreadable_file_is_nobodys(tmp_path: Path, leases: ExitStack, content: str) -> None:
    (tmp_path / LEASE).write_text(content)
    held(leases, tmp_path, me())
