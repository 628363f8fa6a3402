"""Pairs of nodes that exchange before a run, over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as c10d

from megallama.train.slurm import exchange
from megallama.train.slurm.links import judge
from tests.unit.train.slurm.nodes import BYTES


def test_neighbours_find_the_slow_and_the_failing_node(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.train.slurm.nodes", tmp_path],
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    links = dict(map(json.loads, done.stdout.splitlines()))
    fast, slow = BYTES / 1e9, BYTES / 1e10
    assert links == {
        "n0": {"n2": fast, "n7": fast},
        "n1": {},
        "n2": {"n0": fast, "n3": fast},
        "n3": {"n2": slow, "n4": slow},
        "n4": {"n3": fast, "n5": fast},
        "n5": {"n4": fast, "n6": 0.0},
        "n6": {"n5": 0.0, "n7": 0.0},
        "n7": {"n6": 0.0, "n0": fast},
    }
    faults, unclear = judge(links)
    assert (sorted(faults), unclear) == (["n3", "n6"], [])
    assert "unhandled system error" in done.stderr


def test_who_is_unwell_or_does_not_come_in_time_is_left_out_of_the_ring(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = c10d.HashStore()  # type: ignore[attr-defined]
    for rank, name in enumerate(("a", "", "c")):
        store.set(f"node {rank}", name)
    monkeypatch.setattr(exchange, "GATHERING", 0.0)
    assert exchange._gather(store, 5) == [(0, "a"), (2, "c")]


def test_an_exchange_that_hangs_ends_and_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert exchange._in_time(lambda: 24.0) == 24.0
    monkeypatch.setattr(exchange, "EXCHANGE", 0.1)
    assert exchange._in_time(lambda: time.sleep(3600) or 24.0) == 0.0


def test_outside_a_step_of_several_tasks_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")] + ["RANK"]:
        monkeypatch.delenv(name, raising=False)
    exchange.main("n1", 8)
    step = {"STEP_ID": "0", "PROCID": "0", "LOCALID": "0", "JOB_ID": "7"}
    step |= {"STEP_NUM_TASKS": "1", "STEP_TASKS_PER_NODE": "1", "STEP_NODELIST": "n1"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    exchange.main("n1", 8)
    assert capsys.readouterr().out == ""
