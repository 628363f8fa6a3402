"""One host of `overlap_network.py`: a rank's trainers, its clock, and a raw transfer.

Started in its namespace as `overlap_host.py RANK`. Commands come as lines of JSON on standard
input, the first of which names the experiment; each is answered with a line.
"""

from __future__ import annotations

import json
import linecache
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from megallama.autograd import passes
from megallama.config import parse_config
from megallama.dist.connect import Groups, connect
from megallama.dist.group import COVER, COVER_ALL_REDUCE, Group, SingleGroup
from megallama.dist.handle import Done, Handle
from megallama.dist.traffic import Traffic
from megallama.spec.grid import Place, make_grid
from megallama.train import build
from megallama.train import step as step_module
from megallama.train.bench import batches
from megallama.train.build import Trainer, build_trainer
from megallama.train.process import Process, open_store

ADDRESSES = ("10.177.0.1", "10.177.0.2")
STORE_PORT, RAW_PORT = 29500, 29501


class FreeGroup(SingleGroup):
    """A group of several ranks whose collectives are over at once: shapes without communication.

    A gather repeats this rank's shard, kept from the first call of its shape, so that it copies
    nothing; a reduce-scatter keeps this rank's part. An all-reduce gives ones, with which a step
    has valid tokens and a finite norm and is applied on every rank. Values mean nothing else.
    """

    def __init__(self, name: str, rank: int, size: int) -> None:
        super().__init__(name)
        self.rank, self.size = rank, size
        self._gathered: dict[tuple[Any, ...], Tensor] = {}

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Handle[Tensor]:
        key = (x.shape, x.dtype)
        if key not in self._gathered:
            self._gathered[key] = torch.cat([x] * self.size)
        whole = self._gathered[key]
        return Done(whole if out is None else out.copy_(whole), COVER)

    def reduce_scatter(self, x: Tensor, wire: torch.dtype | None = None) -> Handle[Tensor]:
        return Done(x.chunk(self.size)[self.rank], COVER)

    def all_reduce(self, x: Tensor) -> Handle[Tensor]:
        return Done(torch.ones_like(x), COVER_ALL_REDUCE)


@dataclass
class Event:
    """A collective of a traced step; times in seconds of one clock.

    `issued` and `waited` are the pass's, `began` and `ended` the group's own thread's. `phase` is
    the one that waited.
    """

    site: str
    issued: float
    phase: str = ""
    sent: int = 0
    began: float = 0.0
    ended: float = 0.0
    waited: float = 0.0
    exposed: float = 0.0


@dataclass
class Clock:
    """Seconds in each phase since `start`, and the collectives where a trace is on."""

    seconds: dict[str, float] = field(default_factory=dict)
    phase: str = "rest"
    began: float = 0.0
    events: list[Event] | None = None

    def start(self) -> None:
        self.seconds = {"forward": 0.0, "backward": 0.0}
        self.began = time.perf_counter()

    def drive(self, coroutine: passes.Pass[Any], queue: passes.WgradQueue | None = None) -> Any:
        """The step's driver, timed: a pass with a queue is a backward."""
        self.phase = "forward" if queue is None else "backward"
        began = time.perf_counter()
        try:
            return passes.drive(coroutine, queue)
        finally:
            self.seconds[self.phase] += time.perf_counter() - began
            self.phase = "rest"


@dataclass
class TracedHandle:
    """A handle that notes when it is waited for, and how long."""

    handle: Handle[Any]
    event: Event
    clock: Clock

    @property
    def cover(self) -> int:
        return self.handle.cover

    def wait(self) -> Any:
        self.event.phase, self.event.waited = self.clock.phase, time.perf_counter()
        value = self.handle.wait()
        self.event.exposed = time.perf_counter() - self.event.waited
        return value


class TracedGroup:
    """A gloo group that notes each of its collectives while the clock's trace is on."""

    def __init__(self, group: Any, traffic: Traffic, clock: Clock) -> None:
        self._group, self._traffic, self._clock = group, traffic, clock
        self.name, self.rank, self.size = group.name, group.rank, group.size
        self._event: Event | None = None
        self._submit = group._worker.submit
        group._worker.submit = self._timed

    def __getattr__(self, operation: str) -> Any:
        method = getattr(self._group, operation)
        return method if operation == "close" else partial(self._traced, method)

    def _traced(
        self, method: Callable[..., Handle[Any]], *args: Any, **options: Any
    ) -> Handle[Any]:
        clock = self._clock
        if clock.events is None:
            return method(*args, **options)
        event = self._event = Event(f"{method.__name__} {_site()}", time.perf_counter())
        before = sent_bytes(self._traffic)
        handle = method(*args, **options)
        event.sent, self._event = sent_bytes(self._traffic) - before, None
        clock.events.append(event)
        return TracedHandle(handle, event, clock)

    def _timed(self, operation: Callable[[], Any], cover: int) -> Any:
        event = self._event
        if event is None:
            return self._submit(operation, cover)

        def run() -> Any:
            event.began = time.perf_counter()
            try:
                return operation()
            finally:
                event.ended = time.perf_counter()

        return self._submit(run, cover)


def _site() -> str:
    """Which line of a pass asked for the collective."""
    frame = sys._getframe(2)
    while frame.f_back and (
        frame.f_code.co_filename == __file__
        or "/dist/" in frame.f_code.co_filename
        or frame.f_code.co_filename.endswith("tokens.py")
        or "<" in frame.f_code.co_filename
    ):
        frame = frame.f_back
    code = frame.f_code
    line = linecache.getline(code.co_filename, frame.f_lineno).strip()
    return f"{code.co_name}:{frame.f_lineno} {line}"


def sent_bytes(traffic: Traffic) -> int:
    return sum(count.bytes for count in traffic.counts.values())


class Host:
    """A rank's trainers, one for each kind of overlap, over one set of groups."""

    def __init__(self, rank: int, experiment: dict[str, Any]) -> None:
        self.rank, self.experiment, self.clock = rank, experiment, Clock()
        store = open_store(ADDRESSES[0], STORE_PORT, is_master=rank == 0)
        self.process = Process(rank, 2, 0, 1, store, ADDRESSES[rank])
        config = self._config("none")
        self.place = Place(make_grid(config, 2), rank)
        members = self.place.groups(config.model.kv_heads)
        device = torch.device("cpu")
        self.groups = connect(store, rank, members, device, hostname=ADDRESSES[rank])
        if experiment["trace"]:
            for name, group in self.groups.by_name.items():
                if group.size > 1:
                    self.groups.by_name[name] = TracedGroup(group, self.groups.traffic, self.clock)
        free: dict[str, Group] = {
            name: FreeGroup(name, ranks.index(rank), len(ranks))
            if len(ranks) > 1
            else SingleGroup(name)
            for name, ranks in members.items()
        }
        self.free = Groups(free, Traffic())
        self.batch = batches(config, None, self.place)(0)
        self.trainers: dict[tuple[str, bool], Trainer] = {}

    def block(self, overlap: str, free: bool, lead: int, steps: int) -> dict[str, float]:
        """Steps of which the first `lead` are not timed; the mean of the others.

        A step ends with weights still on their way, so with a lead every timed step begins and
        ends alike. What is on its way at the end of the block is waited for, untimed.
        """
        trainer = self._trainer(overlap, free)
        sums: dict[str, float] = {}
        for index in range(lead + steps):
            figures = self._step(trainer)
            if index >= lead:
                sums = {name: sums.get(name, 0.0) + figures[name] for name in figures}
        self._settle(trainer)
        return {name: total / steps for name, total in sums.items()}

    def trace(self, overlap: str, lead: int) -> list[dict[str, Any]]:
        """The collectives that a step waited for, after `lead` others; some began in the last."""
        trainer = self._trainer(overlap, free=False)
        self.clock.events = []
        for _ in range(lead + 1):
            self._step(trainer)
        events = [vars(event) for event in self.clock.events if event.waited > self.clock.began]
        self.clock.events = None
        self._settle(trainer)
        return events

    def transfer(self, sent: int) -> float:
        """Send and receive so many bytes at once, over plain sockets: Mbit/s received."""
        with self._connection() as connection:
            block, received = bytes(1 << 20), 0
            buffer = bytearray(1 << 20)
            began = time.perf_counter()

            def send() -> None:
                for first in range(0, sent, len(block)):
                    connection.sendall(block[: sent - first])

            sender = threading.Thread(target=send)
            sender.start()
            while received < sent:
                received += connection.recv_into(buffer) or sys.exit("the raw transfer broke off")
            seconds = time.perf_counter() - began
            sender.join()
        return 8 * received / seconds / 1e6

    def _connection(self) -> socket.socket:
        if self.rank == 0:
            with socket.create_server((ADDRESSES[0], RAW_PORT)) as server:
                return server.accept()[0]
        for _ in range(100):
            try:
                return socket.create_connection((ADDRESSES[0], RAW_PORT))
            except ConnectionRefusedError:
                time.sleep(0.1)
        sys.exit("the other host does not answer")

    def _settle(self, trainer: Trainer) -> None:
        """Wait for the weights that are on their way."""
        for handle in trainer.zero.state.arriving.values():
            handle.wait()

    def _step(self, trainer: Trainer) -> dict[str, float]:
        before = sent_bytes(self.groups.traffic)
        self.clock.start()
        with patch.object(step_module, "drive", self.clock.drive):
            result = trainer.step.run(self.batch, self.experiment["lr"])
        seconds = time.perf_counter() - self.clock.began
        if not result.applied:
            sys.exit(f"a step was left out ({result.fault}): its time means nothing")
        sent = sent_bytes(self.groups.traffic) - before
        return {"step": seconds, **self.clock.seconds, "bytes": sent}

    def _trainer(self, overlap: str, free: bool) -> Trainer:
        key = (overlap, free)
        if key not in self.trainers:
            groups = self.free if free else self.groups
            with patch.object(build, "connect", lambda *_, **__: groups):
                self.trainers[key] = build_trainer(self._config(overlap), self.process)
        return self.trainers[key]

    def _config(self, overlap: str) -> Any:
        given = self.experiment
        return parse_config(
            {
                "model": given["model"],
                "train": {"steps": 1, "precision": "fp32", **given["train"]},
                "parallel": {**given["parallel"], "overlap": overlap},
                "optimizer": {"lr": given["lr"]},
            }
        )


def main() -> None:
    torch.set_num_threads(1)
    host: Host | None = None
    for line in sys.stdin:
        name, arguments = json.loads(line)
        if host is None:
            host, answer = Host(int(sys.argv[1]), arguments), None
        else:
            answer = getattr(host, name)(**arguments)
        print(json.dumps(answer), flush=True)
    if host is not None:
        host.groups.close()


if __name__ == "__main__":
    main()
