"""Real parents and real workers: the exit codes, what is printed, and that nobody lingers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

COUNT = 3
LIMIT = 60.0  # seconds after which a wait counts as failed

#: Starts a parent for every name given, which shows errors as the command line does; its workers do
#: what the name says. The parents are forked: one import of torch serves them all.
SCRIPT = r"""
import argparse, os, signal, subprocess, sys, time
from pathlib import Path
from megallama.cli import main as cli
from megallama.errors import ConfigError, LostError
from megallama.train.supervisor import supervise

COUNT, ROOT, NAMES = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
NEVER = ["never"]

def place(process, stop):
    import torch
    process.store.set(f"name-{process.rank}", f"r{process.rank}")
    names = [process.store.get(f"name-{rank}").decode() for rank in range(process.size)]
    own_group = os.getpgrp() == os.getpid()
    numbers = (process.rank, process.size, process.local_rank, process.local_size)
    print(*numbers, process.hostname, own_group, torch.get_num_threads(), *names)
    return 0

def others_wait(process, stop):
    process.store.wait(NEVER)

def one_refuses(process, stop):
    if process.rank == 1:
        raise ConfigError("no such key")
    others_wait(process, stop)

def rank_0_refuses(process, stop):
    if process.rank == 0:
        raise ConfigError("no such key")
    others_wait(process, stop)

def all_refuse(process, stop):
    raise ConfigError("no such key")

def all_refuse_differently(process, stop):
    raise ConfigError(f"no such key as k{process.rank}")

def has_a_bug(process, stop):
    if process.rank == 2:
        raise ValueError("m" * 1_000_000 + " and the end")
    others_wait(process, stop)

def is_killed(process, stop):
    if process.rank == 2:
        process.store.wait(["child"])
        os.kill(os.getpid(), signal.SIGKILL)
    if process.rank == 0:
        child = subprocess.Popen(["sleep", "1000"])
        (FOLDER / "pid-child").write_text(str(child.pid))
        process.store.set("child", "")
    others_wait(process, stop)

def crashes_after_its_peers_complain(process, stop):
    if process.rank == 2:
        while True:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGSEGV)
    raise LostError("a peer is lost")

def all_lose_the_network(process, stop):
    raise LostError("the network is gone")

def returns_a_code(process, stop):
    return 3 if process.rank == 1 else 0

def one_is_stopped(process, stop):
    return 75 if process.rank == 1 else 0

def stops_when_asked(process, stop):
    (FOLDER / f"ready-{process.rank}").touch()
    while stop.code is None:
        time.sleep(0.01)
    (FOLDER / f"saved-{process.rank}").touch()
    return stop.code

def is_hung_up_on(process, stop):
    os.kill(os.getppid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGHUP)
    return stop.code or 0

def dies_when_asked(process, stop):
    (FOLDER / f"ready-{process.rank}").touch()
    while stop.code is None or process.rank != 1:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

def is_stopped(process, stop):  # as a debugger or a scheduler does
    os.kill(os.getpid(), signal.SIGSTOP)

def is_stopped_and_continued(process, stop):
    subprocess.Popen(["sh", "-c", f"sleep 0.1; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
    return 0

def never_stops(process, stop):
    (FOLDER / f"ready-{process.rank}").touch()
    if process.rank == 0:  # sees no signal at all
        process.store.wait(NEVER)
    while True:
        if stop.code is not None:
            (FOLDER / f"asked-{process.rank}").touch()
        time.sleep(0.01)

def nobody_reads(process, stop):
    if process.rank == 1:
        raise BrokenPipeError
    others_wait(process, stop)

class SignalOnImport:  # the parent is asked to stop while it imports torch
    def find_spec(self, name, path=None, target=None):
        if name == "torch.distributed":
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGTERM)

def fork_and_signal(fork=os.fork):  # the parent is asked to stop between two forks
    pid = fork()
    if pid:
        signal.raise_signal(signal.SIGTERM)
    return pid

def work(process, stop):
    (FOLDER / f"pid-{process.rank}").write_text(str(os.getpid()))
    return globals()[NAME.partition("@")[0]](process, stop)

def run_parent():
    for number, stream in ((1, "output"), (2, "error")):
        os.dup2(os.open(FOLDER / stream, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if NAME.endswith("@import"):
        sys.meta_path.insert(0, SignalOnImport())
    hangup = signal.SIG_IGN if NAME.endswith("@nohup") else signal.SIG_DFL
    signal.signal(signal.SIGHUP, hangup)
    if NAME.endswith("@fork"):
        os.fork = fork_and_signal
    sys.stdout.write("parent\n")  # stays in the buffer until the forks
    def again(error):
        (FOLDER / "again").touch()

    alone = NAME.endswith("@alone")
    silence = 0.3 if NAME.startswith("is_stopped@") else 1000
    run = lambda args: supervise(1 if alone else COUNT, work, again, silence)
    command = argparse.Namespace(run=run)
    cli._parse = lambda words: command
    return cli.main([])

def write(path, number):  # whoever sees the file sees all of it
    path.with_suffix(".new").write_text(str(number))
    path.with_suffix(".new").rename(path)

parents = {}
if "stops_when_asked@import" not in NAMES:
    import torch.distributed
for NAME in NAMES:
    FOLDER = ROOT / NAME
    FOLDER.mkdir()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = run_parent()
        finally:
            sys.stdout.flush()
            os._exit(code)
    parents[pid] = FOLDER
    write(FOLDER / "parent", pid)
while parents:
    pid, status = os.wait()
    write(parents.pop(pid) / "code", os.waitstatus_to_exitcode(status))
"""


class Ended(NamedTuple):
    code: int
    output: str
    error: str
    folder: Path

    def pids(self) -> list[int]:
        return [int(path.read_text()) for path in sorted(self.folder.glob("pid-*"))]

    def saved(self) -> int:
        return len(list(self.folder.glob("saved-*")))


class Parent:
    """A parent at its work, by the folder where its output, its code and its workers' files go."""

    def __init__(self, folder: Path, starter: subprocess.Popen[bytes]) -> None:
        self.folder, self.starter = folder, starter

    def wait_for(self, *names: str) -> None:
        until = time.monotonic() + LIMIT
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < until, f"{names} not written"
            assert not self.starter.poll(), "the script is faulty"
            time.sleep(0.01)

    def ready(self) -> Parent:
        self.wait_for("parent", *(f"ready-{rank}" for rank in range(COUNT)))
        return self

    def signal(self, number: int) -> None:
        os.kill(int((self.folder / "parent").read_text()), number)

    def end(self) -> Ended:
        self.wait_for("code")
        code = int((self.folder / "code").read_text())
        texts = [(self.folder / stream).read_text() for stream in ("output", "error")]
        return Ended(code, texts[0], texts[1], self.folder)

    def kill(self) -> None:
        if (self.folder / "parent").exists() and not (self.folder / "code").exists():
            with suppress(ProcessLookupError):  # it ended just now
                self.signal(signal.SIGKILL)


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Parent]]:
    """The parents of every test, side by side."""
    folder = tmp_path_factory.mktemp("supervisor")
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    early = [name for name in ENDS if name.endswith("@import")]
    started: dict[str, Parent] = {}
    for names in (early, [name for name in (*ENDS, *STOPPED) if name not in early]):
        command = [sys.executable, "-c", SCRIPT, str(COUNT), str(folder), *names]
        starter = subprocess.Popen(command, env=environment)
        started |= {name: Parent(folder / name, starter) for name in names}
    yield started
    for parent in started.values():
        parent.kill()
    for parent in started.values():
        parent.starter.wait(LIMIT)


def is_there(pid: int) -> bool:
    """Whether the process runs. One that nobody collects yet does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return not Path("/proc/self").exists()


def assert_gone(pids: list[int]) -> None:
    until = time.monotonic() + LIMIT
    while left := [pid for pid in pids if is_there(pid)]:
        assert time.monotonic() < until, f"{left} are still there"
        time.sleep(0.05)


ERROR = "megallama: error: "
#: Work → its exit code, and what the whole of standard error matches.
ENDS = {
    "place": (0, ""),
    "one_refuses": (78, f"{ERROR}rank 1: no such key\n"),
    "rank_0_refuses": (78, f"{ERROR}no such key\n"),
    "all_refuse": (78, f"{ERROR}no such key\n"),
    "all_refuse_differently": (78, rf"{ERROR}rank (\d): no such key as k\1\n"),
    "has_a_bug": (1, "rank 2: m+ and the end\n"),
    "is_killed": (69, f"{ERROR}rank 2 was killed by SIGKILL, .*\n"),
    "crashes_after_its_peers_complain": (69, f"{ERROR}rank 2 was killed by SIGSEGV\n"),
    "all_lose_the_network": (69, f"{ERROR}the network is gone\n"),
    "returns_a_code": (3, f"{ERROR}rank 1 ended with exit code 3\n"),
    "one_is_stopped": (75, ""),
    "is_stopped@alone": (69, rf"{ERROR}rank 0 is lost \(host .+\): .* stopped by a signal .*\n"),
    "is_stopped_and_continued@alone": (0, ""),
    "nobody_reads": (0, ""),
    "stops_when_asked@import": (75, ""),
    "stops_when_asked@fork": (75, ""),
    "is_hung_up_on@nohup": (0, ""),
}


#: Work that lasts until a signal of ours.
STOPPED = {
    "stops_when_asked@sigterm": (signal.SIGTERM, 75),
    "stops_when_asked@sigusr1": (signal.SIGUSR1, 75),
    "stops_when_asked@sighup": (signal.SIGHUP, 75),
    "stops_when_asked@sigint": (signal.SIGINT, 130),
    "dies_when_asked@sigterm": (signal.SIGTERM, 69),
    "never_stops@sigint": (signal.SIGINT, 130),
    "never_stops@sigkill": (signal.SIGKILL, -signal.SIGKILL),
}


@pytest.mark.parametrize("name", ENDS)
def test_how_it_ends(parents: dict[str, Parent], name: str) -> None:
    ended = parents[name].end()
    code, pattern = ENDS[name]
    assert ended.code == code, ended.error
    assert re.fullmatch(pattern, ended.error), ended.error[-2000:]
    assert ended.output.count("parent\n") == 1
    assert_gone(ended.pids())
    assert (ended.folder / "again").exists() == (code == 69)
    if name == "place":
        threads = max(1, len(os.sched_getaffinity(0)) // COUNT)
        assert sorted(ended.output.splitlines()[1:]) == [
            f"{rank} 3 {rank} 3 127.0.0.1 True {threads} r0 r1 r2" for rank in range(COUNT)
        ]
    if name == "is_killed":
        assert len(ended.pids()) == COUNT + 1, "the workers and the child of one"
    if name.startswith("stops_when_asked"):
        assert ended.saved() == (0 if name.endswith("@import") else COUNT)


@pytest.mark.parametrize("name", [name for name in STOPPED if name.startswith("stops")])
def test_every_worker_saves_after_a_signal(parents: dict[str, Parent], name: str) -> None:
    number, code = STOPPED[name]
    parents[name].ready().signal(number)
    ended = parents[name].end()
    assert (ended.code, ended.error, ended.saved()) == (code, "", COUNT)
    assert_gone(ended.pids())


def test_workers_that_were_asked_to_stop_are_not_replaced(parents: dict[str, Parent]) -> None:
    parent = parents["dies_when_asked@sigterm"].ready()
    parent.signal(signal.SIGTERM)
    ended = parent.end()
    assert ended.code == 69
    assert ended.error.startswith(f"{ERROR}rank 1 was killed by SIGKILL")
    assert not (ended.folder / "again").exists()
    assert_gone(ended.pids())


def test_a_second_ctrl_c_ends_even_workers_that_hang(parents: dict[str, Parent]) -> None:
    parent = parents["never_stops@sigint"].ready()
    parent.signal(signal.SIGINT)
    parent.wait_for("asked-1", "asked-2")
    parent.signal(signal.SIGINT)
    ended = parent.end()
    assert (ended.code, ended.error) == (130, "megallama: interrupted\n")
    assert_gone(ended.pids())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_workers_do_not_outlive_a_killed_parent(parents: dict[str, Parent]) -> None:
    parent = parents["never_stops@sigkill"].ready()
    parent.signal(signal.SIGKILL)
    ended = parent.end()
    assert ended.code == -signal.SIGKILL
    assert len(ended.pids()) == COUNT
    assert_gone(ended.pids())
