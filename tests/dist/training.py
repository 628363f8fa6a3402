"""The runs of `test_training`: their layouts, which of them are stopped, and how they go on."""

from __future__ import annotations

import shutil
import signal
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

from megallama.checkpoint.store import Checkpoint, committed_checkpoints
from megallama.train.metrics import Row, read_metrics
from tests.dist.commands import LIMIT, Command, Ended, last_step

#: Layout → the words that ask for it.
LAYOUTS = {
    "one": [],
    "tensor": ["parallel.tensor=2", "--nproc", "2"],
    "data": ["--nproc", "2"],
    "grid": ["parallel.tensor=2", "parallel.data=2", "--nproc", "4"],
    "pipeline": ["parallel.pipeline=2", "parallel.schedule=zb-h1", "--nproc", "2"],
    "stages": [
        "parallel.pipeline=2",
        "parallel.tensor=2",
        "parallel.schedule=zb-v",
        "--nproc",
        "4",
    ],
    "replicas": [
        "parallel.pipeline=2",
        "parallel.data=2",
        "parallel.schedule=interleaved",
        "parallel.early_step=true",
        "--nproc",
        "4",
    ],
}
SIZES = {"one": 1, "tensor": 2, "data": 2, "grid": 4, "pipeline": 2, "stages": 4, "replicas": 4}
FP32 = ["train.precision=fp32", "train.steps=6", "model.layers=2"]
#: Run → its words. All train from the start without a stop.
STRAIGHT = {
    **LAYOUTS,
    **{
        f"{layout}-fp32": [*LAYOUTS[layout], *FP32]
        for layout in ("one", "tensor", "data", "grid", "pipeline")
    },
    "grid-none": [*LAYOUTS["grid"], "parallel.overlap=none"],
    "grid-full": [*LAYOUTS["grid"], "parallel.overlap=full"],
    "grid-whole-sequence": [*LAYOUTS["grid"], "parallel.sequence_parallel=false"],
}


class Stop(NamedTuple):
    """A run that is stopped once it has done `step`: its parent by a signal, or one worker."""

    layout: str
    step: int
    number: signal.Signals
    code: int
    worker: int | None = None


#: The save of step 6 waits for that of step 3, so a kill after step 7 finds a checkpoint.
STOPS = {
    "stopped-one": Stop("one", 4, signal.SIGTERM, 75),
    "stopped-tensor": Stop("tensor", 3, signal.SIGINT, 130),
    "stopped-data": Stop("data", 2, signal.SIGTERM, 75, worker=1),
    "stopped-grid": Stop("grid", 2, signal.SIGUSR1, 75),
    "stopped-stages": Stop("stages", 2, signal.SIGTERM, 75),
    "killed-replicas": Stop("replicas", 7, signal.SIGKILL, 69, worker=3),
    "killed-grid": Stop("grid", 7, signal.SIGKILL, 69, worker=2),
    "killed-tensor": Stop("tensor", 7, signal.SIGKILL, 69, worker=0),
}
#: Run → the run that it is a copy of, stopped, and the layout in which it goes on.
MOVES = {
    "grid-to-one": ("stopped-grid", "one"),
    "one-to-grid": ("stopped-one", "grid"),
    "tensor-to-data": ("stopped-tensor", "data"),
    "killed-to-data": ("killed-grid", "data"),
    "one-to-stages": ("stopped-one", "stages"),
    "killed-to-replicas": ("killed-grid", "replicas"),
}
#: A copy of a stopped run of pipeline ranks that changes its layout twice.
TWICE = "stages-to-data-to-tensor"


class Bench:
    """Where these runs are, how their commands ended, and the step that all reach."""

    def __init__(self, folder: Path, config: Path) -> None:
        self.folder, self.config = folder, config
        self.ended: dict[str, Ended] = {}
        self.last = 0
        self.stopped_at: dict[str, int] = {}
        self.workers: dict[str, list[int]] = {}

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def rows(self, name: str) -> list[Row]:
        return read_metrics(self.run(name) / "metrics.jsonl")

    def newest(self, name: str) -> Checkpoint:
        return Checkpoint(committed_checkpoints(self.run(name) / "checkpoints")[-1])

    def start(self, kind: str, name: str, *words: str) -> Command:
        words = ("train", str(self.config), f"run.name={name}", *words)
        return Command(self.folder / kind / name, words)

    def stop(self) -> None:
        """Start the runs of STOPS, and stop each."""
        commands = {n: self.start("stop", n, *LAYOUTS[s.layout]) for n, s in STOPS.items()}
        try:
            # Those that train fast must not run far ahead of those that train slowly.
            waiting = dict(STOPS)
            while waiting:
                for name, stop in list(waiting.items()):
                    if last_step(self.run(name)) >= stop.step or not commands[name].running:
                        self.workers[name] = commands[name].stop(stop.number, stop.worker)
                        del waiting[name]
                time.sleep(0.01)
            for name in STOPS:
                self.ended[name] = commands[name].end()
                self.stopped_at[name] = last_step(self.run(name))
        finally:
            for command in commands.values():
                command.kill()
        self.last = max(self.stopped_at.values()) + 2

    def go_on(self) -> None:
        """Train all to the same step, a few side by side."""
        for name, (source, _) in MOVES.items():
            shutil.copytree(self.run(source), self.run(name))
        shutil.copytree(self.run("stopped-stages"), self.run(TWICE))
        words = {
            **STRAIGHT,
            **{name: LAYOUTS[stop.layout] for name, stop in STOPS.items()},
            **{name: LAYOUTS[layout] for name, (_, layout) in MOVES.items()},
        }
        waiting = [
            (name, [f"train.steps={self.last}", *its_words]) for name, its_words in words.items()
        ]
        started: dict[str, Command] = {}
        try:
            while waiting or started:
                while waiting and len(started) < 4:
                    name, its_words = waiting.pop(0)
                    started[name] = self.start("go", name, *its_words)
                wait([command.process.sentinel for command in started.values()], LIMIT)
                done = [name for name in started if not started[name].running]
                for name in done or list(started):
                    self.ended[f"{name}, to the end"] = started.pop(name).end()
        finally:
            for command in started.values():
                command.kill()
