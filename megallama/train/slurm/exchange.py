"""GB/s between this node and its neighbours: `python -m megallama.train.slurm.exchange NODE GPUS`.

A task of srun on each node; GPUS is 0 where the node is not to take part. The first task waits for
the others and makes a ring of those that are well; docs/slurm.md says what follows. Prints, as
JSON, peer → GB/s as NCCL's tests count it, of the slowest of the node's GPUs; 0 where there was no
exchange. Every wait has a limit: `LONGEST` in all.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch

from megallama.dist.compat import PrefixStore, Store
from megallama.dist.connect import connect
from megallama.errors import UserError
from megallama.train.process import ALONE, find_place, open_store
from megallama.train.process import connect as join_job
from megallama.train.slurm.links import EXCHANGE, GATHERING, rounds

#: Bytes that each GPU, or a node without one, reduces: past the sizes where latency counts.
BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}
REPETITIONS = 5


@dataclass(frozen=True)
class Node:
    """This node's place among the `size` tasks, and how another process of it reaches their store.

    `gpus`: those that take part.
    """

    name: str
    rank: int
    size: int
    gpus: int
    meet: Callable[[], Store]


def exchange(node: Node, store: Store) -> dict[str, float]:
    """Peer → GB/s. Empty where this node, or every other one, takes no part.

    Raises:
        RuntimeError: the store does not answer.
    """
    found: dict[str, float] = {}
    store.set(f"node {node.rank}", node.name if node.gpus else "")
    if node.rank == 0:
        store.set("ring", json.dumps(_gather(store, node.size)))
    store.wait(["ring"], timedelta(seconds=2 * GATHERING))
    ring: list[tuple[int, str]] = json.loads(store.get("ring"))
    ranks = [rank for rank, _ in ring]
    for number, pairs in enumerate(rounds(len(ring)) if node.rank in ranks else []):
        for pair in pairs:
            if node.rank in (ends := [ranks[place] for place in pair]):
                (peer,) = (name for rank, name in ring if rank in ends and rank != node.rank)
                found[peer] = _in_time(partial(_measure, node, ends))
        _together(store, f"round {number}", len(ring))
    _together(store, "the end", node.size, stay=node.rank == 0)
    return found


def _gather(store: Store, size: int) -> list[tuple[int, str]]:
    """The ranks and names of those that are well and came in time, in rank order."""
    deadline, found = time.monotonic() + GATHERING, list[tuple[int, str]]()
    for rank in range(size):
        key = f"node {rank}"
        while not store.check([key]) and time.monotonic() < deadline:
            time.sleep(0.05)
        name = store.get(key).decode() if store.check([key]) else ""
        found += [(rank, name)] if name else []
    return found


def _together(store: Store, what: str, count: int, stay: bool = True) -> None:
    """Wait for `count` nodes to come here, or for no longer than an exchange takes."""
    with suppress(RuntimeError):  # one of them hangs, or is lost, or it is the first and left
        if store.add(what, 1) == count:
            store.set(f"all at {what}", "")
        if stay:
            store.wait([f"all at {what}"], timedelta(seconds=EXCHANGE))


def _in_time(work: Callable[[], float]) -> float:
    """What `work` returns, in a process of its own, which may hang; 0.0 without an answer."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)

    def run() -> None:
        try:
            sender.send(work())
        except (UserError, RuntimeError) as error:
            print(str(error).partition("\n")[0], file=sys.stderr, flush=True)
        os._exit(0)  # hung threads are not waited for

    process = fork.Process(target=run)
    process.start()
    sender.close()
    try:
        return float(receiver.recv()) if receiver.poll(EXCHANGE) else 0.0
    except EOFError:
        return 0.0
    finally:
        process.kill()  # in a driver that hangs it may live on


def _measure(node: Node, ends: list[int]) -> float:
    """GB/s of the slowest of this node's GPUs, all of which exchange with the peer's at once.

    Raises:
        RuntimeError: one of them failed.
    """
    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    devices = [torch.device("cuda", k) for k in range(node.gpus)] if cuda else [torch.device("cpu")]
    speeds: list[float] = []

    def run(index: int, device: torch.device) -> None:
        store = PrefixStore(f"{ends}/{index}", node.meet())
        speeds.append(all_reduce_speed(store, node.rank, ends, device))

    threads = [threading.Thread(target=run, args=each) for each in enumerate(devices)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(speeds) < len(devices):
        raise RuntimeError(f"{len(devices) - len(speeds)} of {len(devices)} devices failed")
    return min(speeds)


def all_reduce_speed(store: Store, rank: int, ends: list[int], device: torch.device) -> float:
    """GB/s of the best of some all-reduces by the ranks `ends`, which meet in the store.

    Raises:
        UserError, RuntimeError: it failed.
    """
    limit = timedelta(seconds=EXCHANGE)
    groups = connect(store, rank, {"pair": ends}, device, timeout=limit)
    x = torch.ones(BYTES[device.type] // 4, device=device)
    best = 0.0
    for _ in range(REPETITIONS):
        began = time.perf_counter()
        total = groups["pair"].all_reduce(x).wait()
        total[-1].item()  # a GPU is waited for
        best = max(best, x.nbytes / (time.perf_counter() - began) / 1e9)
    groups.close()
    if float(total.amin()) != 2 or float(total.amax()) != 2:
        raise RuntimeError("wrong sums")
    return best


def main(name: str, gpus: int) -> None:
    """Print what the pairs of this node exchange; nothing outside a step of several tasks."""
    place = find_place(os.environ)
    process = ALONE if place is None else join_job(place)
    if place is None or process.store is None:
        return
    meet = partial(open_store, place.host, place.port, is_master=False)
    found = exchange(Node(name, process.rank, process.size, gpus, meet), process.store)
    print(json.dumps(found), flush=True)
    os._exit(0)  # a process that hangs in a driver is not waited for


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
