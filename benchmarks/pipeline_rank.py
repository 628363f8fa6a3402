"""One rank of `pipeline_schedules.py`: passes that only wait, and trainers; and the ranks' parent.

Every rank is a forked process with one thread for compute. It answers what the parent asks of all
ranks at once, such as to run a schedule from an agreed time on: `time.monotonic` is one clock for
all processes of a machine.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from itertools import permutations
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

from megallama.autograd.passes import Pass, WgradQueue
from megallama.config.load import parse_config
from megallama.config.schedules import default_virtual_stages
from megallama.data.dataset import Batch
from megallama.dist.compat import PrefixStore, Store
from megallama.dist.connect import Groups, connect
from megallama.dist.recorder import Recorder
from megallama.parallel.pipeline import Pipeline
from megallama.spec.grid import ALONE as WHOLE_BATCH
from megallama.spec.groups import link_name
from megallama.spec.schedules.actions import Schedule
from megallama.spec.schedules.build import forward_only, make_schedule
from megallama.train.bench import batches
from megallama.train.build import Trainer, build_trainer
from megallama.train.process import Process

LOCAL = "127.0.0.1"
#: Seconds from the parent's question to the agreed start: every rank has heard it by then.
LEAD = 0.05
#: What the recorder calls the passes.
PASSES = frozenset(("F", "B", "W", "BW", "FB"))
LR = 1e-4
#: Seconds that a rank is given to close its groups.
END = 10.0

#: A pass: its kind, and when it began and ended, in seconds from the agreed start.
Timed = tuple[str, float, float]
#: The passes of every rank.
Walk = Sequence[Sequence[Timed]]
#: When a rank's training step ended, and its passes.
Step = tuple[float, list[Timed]]


def schedule_of(name: str, stages: int, micro_batches: int) -> Schedule:
    """The schedule with its usual number of virtual stages."""
    return make_schedule(name, stages, micro_batches, default_virtual_stages(name))


class Waits:
    """Passes that wait, in place of a model's: `parallel.pipeline.ChunkPasses`.

    `seconds`: a chunk's F, B, W and BW. What travels has `size` bytes and means nothing.
    """

    def __init__(self, seconds: Mapping[str, float], last_chunk: int, size: int) -> None:
        self.seconds, self.last, self.elements = seconds, last_chunk, max(1, size // 4)
        self.message = torch.zeros(self.elements)

    def forward(self, chunk: int, micro_batch: int, x: Tensor | None) -> Pass[Tensor | None]:
        return self._wait("F", None if chunk == self.last else self.message)

    def backward(
        self, chunk: int, micro_batch: int, dz: Tensor | None, queue: WgradQueue
    ) -> Pass[Tensor | None]:
        return self._wait("BW", None if chunk == 0 else self.message)

    def backward_activations(
        self, chunk: int, micro_batch: int, dz: Tensor | None
    ) -> Pass[Tensor | None]:
        return self._wait("B", None if chunk == 0 else self.message)

    def backward_weights(self, chunk: int, micro_batch: int) -> Pass[Any]:
        return self._wait("W", None)

    def buffer(self) -> Tensor:
        return torch.empty(self.elements)

    def reduce(self, chunk: int) -> None:
        """Nothing to add up."""

    def step(self) -> None:
        """Nothing to update."""

    def _wait(self, kind: str, result: Tensor | None) -> Pass[Tensor | None]:
        # A sleep of no length takes 0.1 ms as well.
        if self.seconds[kind]:
            time.sleep(self.seconds[kind])
        yield from ()
        return result


class Rank:
    """What a rank is asked; every method answers something that pickles."""

    def __init__(self, rank: int, size: int, store: Store) -> None:
        self.rank, self.size, self.store = rank, size, store
        self.trainers: dict[str, Trainer] = {}
        self.batches: dict[str, Batch] = {}

    @cached_property
    def groups(self) -> Groups:
        """A link in each direction between any two ranks that some schedule joins."""
        members = {
            link_name(*ends): ends
            for ends in permutations(range(self.size), 2)
            if self.rank in ends and abs(ends[0] - ends[1]) in (1, self.size - 1)
        }
        store = PrefixStore("waits", self.store)
        return connect(store, self.rank, members, torch.device("cpu"), hostname=LOCAL)

    def lateness(self, seconds: float, count: int, at: float) -> float:
        """How much longer than asked a sleep of `seconds` takes: the median of `count`."""
        sleep_until(at)
        late = []
        for _ in range(count):
            begin = time.monotonic()
            time.sleep(seconds)
            late.append(time.monotonic() - begin - seconds)
        return statistics.median(late)

    def walk(
        self, name: str, micro_batches: int, seconds: Mapping[str, float], size: int, at: float
    ) -> list[Timed]:
        """Run a schedule over waits from time `at` on; the passes in the order of the list."""
        schedule = schedule_of(name, self.size, micro_batches)
        pipeline, passes = self._pipeline(schedule, seconds, size, self.groups.recorder)
        self.groups.recorder.on = True
        sleep_until(at)
        pipeline.run(passes)
        self.groups.recorder.on = False
        return _taken(self.groups.recorder, at)

    def rush(self, name: str, micro_batches: int, training: bool, at: float) -> float:
        """Run a schedule over passes of no length from time `at` on; when it ended, from then."""
        schedule = schedule_of(name, self.size, micro_batches)
        schedule = schedule if training else forward_only(schedule)
        nothing = dict.fromkeys(("F", "B", "W", "BW"), 0.0)
        pipeline, passes = self._pipeline(schedule, nothing, 4, Recorder())
        sleep_until(at)
        pipeline.run(passes)
        return time.monotonic() - at

    def build(self, name: str, config: Mapping[str, Any], alone: bool, at: float) -> None:
        """Build a trainer: of a pipeline of all ranks, or of rank 0 alone."""
        if alone and self.rank:
            return
        rank, size = (0, 1) if alone else (self.rank, self.size)
        store = None if alone else PrefixStore(name, self.store)
        run = parse_config(dict(config))
        self.trainers[name] = build_trainer(run, Process(rank, size, rank, size, store, LOCAL))
        self.batches[name] = batches(run, None, WHOLE_BATCH)(0)

    def step(self, name: str, at: float) -> Step | None:
        """A training step from time `at` on: when it ended, and its passes."""
        trainer = self.trainers.get(name)
        if trainer is None:
            return None
        recorder = trainer.groups.recorder
        recorder.on = True
        sleep_until(at)
        result = trainer.step.run(self.batches[name], LR)
        end = time.monotonic() - at
        recorder.on = False
        if not result.applied:
            sys.exit(f"a step was left out ({result.fault}): its time means nothing")
        return end, _taken(recorder, at)

    def close(self) -> None:
        for trainer in self.trainers.values():
            trainer.groups.close()
        if "groups" in vars(self):
            self.groups.close()

    def _pipeline(
        self, schedule: Schedule, seconds: Mapping[str, float], size: int, recorder: Recorder
    ) -> tuple[Pipeline, Waits]:
        links = {ends: self.groups[link_name(*ends)] for ends in schedule.links if self._in(ends)}
        passes = Waits(seconds, schedule.chunks - 1, size)
        return Pipeline(schedule, self.rank, links, recorder=recorder), passes

    def _in(self, ends: tuple[int, int]) -> bool:
        return self.rank in ends


def sleep_until(at: float) -> None:
    time.sleep(max(0.0, at - time.monotonic()))


def _taken(recorder: Recorder, at: float) -> list[Timed]:
    return [
        (event.kind, event.begin - at, event.end - at)
        for event in recorder.take()
        if event.lane == "compute" and event.kind in PASSES
    ]


class Ranks:
    """The parent's view of `size` ranks, each of which is made by `make(rank, size, store)`."""

    def __init__(self, size: int, make: Callable[[int, int, Store], Any] = Rank) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        fork = multiprocessing.get_context("fork")
        for rank in range(size):
            here, there = fork.Pipe()
            self._pipes.append(here)
            path = f"{self._folder.name}/store"
            arguments = (partial(make, rank, size), path, there, list(self._pipes))
            self._processes.append(fork.Process(target=_serve, args=arguments, daemon=True))
            self._processes[-1].start()
            there.close()  # so that a rank that dies is an EOFError here and not a wait for ever

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(END)
            process.kill()
        self._folder.cleanup()

    def ask(self, method: str, **arguments: Any) -> list[Any]:
        """Every rank's answer; `at`, an agreed start, goes with the question."""
        question = (method, arguments | dict(at=time.monotonic() + LEAD))
        try:
            for pipe in self._pipes:
                pipe.send(question)
            return [pipe.recv() for pipe in self._pipes]
        except (EOFError, ConnectionError):
            sys.exit(f"a rank died at {method} {arguments} (its error is above)")


def _serve(
    make: Callable[[Store], Any], path: str, pipe: Connection, parents: list[Connection]
) -> None:
    """A rank's process. `parents`: the parent's ends, which a fork inherits and would keep open."""
    for end in parents:
        end.close()
    torch.set_num_threads(1)
    here = make(FileStore(path))
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            break
        pipe.send(getattr(here, method)(**arguments))
    here.close()
