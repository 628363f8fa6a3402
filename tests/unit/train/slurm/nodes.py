"""Nodes that exchange over gloo, each a process of this machine: `python -m … FOLDER`.

n1 found itself unwell. n3's clock runs ten times as fast, so that what it takes part in looks slow
there; all the others' show one second a reading. n6's exchanges fail once its peer is there. Each
prints a line of JSON: its name, and what it found.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed import FileStore  # type: ignore[attr-defined]

from megallama.dist.connect import connect
from megallama.train.slurm import exchange
from megallama.train.slurm.exchange import Node

COUNT, BYTES = 8, 4096
UNWELL, SLOW, FAILING = 1, 3, 6


def fail(store: Any, rank: int, ends: list[int], device: torch.device) -> float:
    connect(store, rank, {"pair": ends}, device, timeout=timedelta(seconds=60)).close()
    raise RuntimeError("unhandled system error")


def live(rank: int, path: str) -> None:
    tick = itertools.count(step=10 if rank == SLOW else 1)
    clock = SimpleNamespace(perf_counter=lambda: next(tick))
    vars(clock).update(monotonic=time.monotonic, sleep=time.sleep)
    exchange.time = clock
    if rank == FAILING:
        exchange.all_reduce_speed = fail
    meet = partial(FileStore, path, COUNT)
    node = Node(f"n{rank}", rank, COUNT, int(rank != UNWELL), meet)
    found = exchange.exchange(node, meet())
    os.write(1, (json.dumps([node.name, found]) + "\n").encode())


if __name__ == "__main__":
    exchange.BYTES["cpu"] = BYTES
    for rank in range(COUNT):
        if os.fork() == 0:
            live(rank, sys.argv[1] + "/store")
            os._exit(0)
    for _ in range(COUNT):
        os.wait()
