"""The same command under torchrun, and under srun as far as its variables go."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT = 240.0  # it ends hangs only: torch alone takes long to import on a busy machine

SCRIPT = r"""
import argparse, sys, time
from megallama.cli import main as cli
from megallama.errors import ConfigError
from megallama.train.launch import launch

def work(prepared, process, stop):
    process.store.set(f"name-{process.rank}", f"r{process.rank}")
    names = [process.store.get(f"name-{rank}").decode() for rank in range(process.size)]
    numbers = (process.rank, process.size, process.local_rank, process.local_size)
    sys.stdout.write(" ".join(map(str, (*numbers, *names))) + "\n")
    sys.stdout.flush()
    if sys.argv[1:] == ["refuse"]:
        time.sleep(process.rank == 0)
        raise ConfigError("no such key")
    return 0

command = argparse.Namespace(run=lambda args: launch(1, lambda size: size, work))
cli._parse = lambda words: command
raise SystemExit(cli.main([]))
"""
LINES = ["0 2 0 2 r0 r1", "1 2 1 2 r0 r1"]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_torchrun(script: Path) -> None:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == LINES


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("words, code", [([], 0), (["refuse"], 78)])
def test_srun(script: Path, words: list[str], code: int) -> None:
    port = str(free_port())
    tasks = []
    for rank in range(2):
        environ = {
            **os.environ,
            "SLURM_JOB_ID": "1",
            "SLURM_STEP_ID": "0",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_TASKS_PER_NODE": "2",
            "SLURM_STEP_NODELIST": "127.0.0.1",
            "MASTER_PORT": port,
        }
        pipe = subprocess.PIPE
        command = [sys.executable, str(script), *words]
        tasks.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environ))
    try:
        ends = [task.communicate(timeout=LIMIT) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    assert [task.returncode for task in tasks] == [code, code], ends
    assert sorted("".join(output for output, _ in ends).splitlines()) == LINES
    errors = "".join(error for _, error in ends)
    assert errors.count("no such key") == (1 if words else 0), "printed by one of them"
