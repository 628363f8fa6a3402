"""Signals that a worker gives itself at a named point of a run, once, whatever is restarted.

A case is text that repeats it: `grid forward@2#3 recovery-read@0#0` kills rank 2 of layout `grid`
as it begins its fourth forward, and rank 0 as it reads the checkpoint to go on from.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import megallama.optim.adamw as adamw_module
from megallama.checkpoint.store import Checkpoint
from megallama.dist.link import Link
from megallama.files import Disk
from megallama.parallel.zero import Zero
from megallama.train.lease import Lease
from megallama.train.local_worker import LocalWorker
from megallama.train.metrics import MetricsWriter
from megallama.train.passes import StepPasses
from megallama.train.saver import HostCopy, Saver
from tests.dist.training import LAYOUTS as WORDS
from tests.dist.training import SIZES

LAYOUTS = {
    **WORDS,
    "thirds": ["parallel.data=3", "train.global_batch=6", "--nproc", "3"],
    "gpipe": ["parallel.pipeline=2", "parallel.schedule=gpipe", "--nproc", "2"],
}
RANKS = {**SIZES, "thirds": 3, "gpipe": 2}


class Point(NamedTuple):
    """A call in which a worker may end: before it, in its middle or after it.

    `times`: about how often a worker makes it in a run of `STEPS` steps. `leads`: only rank 0 does.
    """

    owner: Any
    name: str
    times: int
    when: str = "before"
    leads: bool = False


STEPS, SAVES = 6, 3
#: Seconds of the unit in which the point `time` counts, from a worker's start.
TICK = 0.01
TRAINING = {
    "time": Point(None, "", 100),
    "forward": Point(StepPasses, "forward", STEPS),
    "backward": Point(StepPasses, "_backward", STEPS),
    "message": Point(Link, "post", 10 * STEPS),
    "reduce": Point(Zero, "_reduce", 2 * STEPS),
    "update": Point(adamw_module, "adamw_", 8 * STEPS),
    "gather": Point(Zero, "changing_weights", STEPS),
    "row": Point(MetricsWriter, "write", STEPS, "half", leads=True),
}
SAVING = {
    "save-start": Point(Saver, "start", SAVES - 1),
    "save-copy": Point(HostCopy, "take", SAVES - 1),
    "save-begin": Point(Disk, "mkdir", SAVES, leads=True),
    "save-begun": Point(Disk, "mkdir", SAVES, "after", leads=True),
    "save-create": Point(Disk, "create", SAVES),
    "save-write": Point(Disk, "append", 2 * SAVES, "half"),
    "save-fsync": Point(Disk, "sync", SAVES),
    "save-fsynced": Point(Disk, "sync", SAVES, "after"),
    "save-commit": Point(Disk, "rename", SAVES, leads=True),
    "save-committed": Point(Disk, "rename", SAVES, "after", leads=True),
    "save-verify": Point(Disk, "forget", SAVES),
    "retention": Point(Disk, "unlink", SAVES, leads=True),
    "retention-rmdir": Point(Disk, "rmdir", SAVES // 2, leads=True),
}
RECOVERY = {
    "recovery-lease": Point(Lease, "take", 1, leads=True),
    "recovery-leased": Point(Lease, "take", 1, "after", leads=True),
    "recovery-read": Point(Checkpoint, "fill", 1),
    "recovery-bytes": Point(Disk, "read_into", 20),
    "recovery-filled": Point(Checkpoint, "fill", 1, "after"),
}
POINTS = {**TRAINING, **SAVING, **RECOVERY}
PLACES = {"steps": TRAINING, "save": SAVING, "recovery": RECOVERY}
#: Signals that ask for the end.
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Blow(NamedTuple):
    """A signal at the `number`-th call of a point, from 0 on, that rank makes in one start."""

    point: str
    rank: int
    number: int = 0
    signal: signal.Signals = signal.SIGKILL

    def __str__(self) -> str:
        kind = "" if self.signal == signal.SIGKILL else f"!{self.signal.name}"
        return f"{self.point}@{self.rank}#{self.number}{kind}"


class Case(NamedTuple):
    layout: str
    blows: tuple[Blow, ...]

    def __str__(self) -> str:
        return " ".join([self.layout, *map(str, self.blows)])


def parse(text: str) -> Case:
    """A case from its text."""
    layout, *words = text.split()
    blows = []
    for word in words:
        point, _, rest = word.partition("@")
        place, _, kind = rest.partition("!")
        rank, _, number = place.partition("#")
        chosen = signal.Signals[kind] if kind else signal.SIGKILL
        blows.append(Blow(point, int(rank), int(number or 0), chosen))
    return Case(layout, tuple(blows))


def draw(
    generator: random.Random, number: signal.Signals = signal.SIGKILL, place: str = "steps"
) -> Case:
    """A random case whose last blow falls in `steps`, a `save` or a `recovery`, which takes another
    one before it: a SIGKILL."""
    layout = generator.choice(list(LAYOUTS))  # where a rank is alone, a message is never struck

    def blow(points: dict[str, Point], kind: signal.Signals) -> Blow:
        name = generator.choice(list(points))
        point = points[name]
        rank = 0 if point.leads else generator.randrange(RANKS[layout])
        return Blow(name, rank, generator.randrange(point.times), kind)

    if number in STOPS:  # heard between two steps, wherever it falls
        steps = {name: TRAINING[name] for name in ("forward", "backward", "update", "gather")}
        return Case(layout, (blow(steps, number),))
    before = [blow(generator.choice([TRAINING, SAVING]), signal.SIGKILL)]
    if place != "recovery" and generator.random() < 0.6:
        before = []
    return Case(layout, (*before, blow(PLACES[place], number)))


def drawn(generator: random.Random, number: signal.Signals, count: int) -> list[Case]:
    """Of ten cases four in steps, four in saves and two in recoveries."""
    order = ("steps", "save", "steps", "save", "recovery")
    return [draw(generator, number, order[i % len(order)]) for i in range(count)]


def place_of(point: str) -> str:
    """Of PLACES."""
    return next(place for place, points in PLACES.items() if point in points)


def struck(folder: Path, index: int) -> Path:
    """The file that says that a case's blow fell, with the number of steps done by then and the
    time, which is one clock for all processes."""
    return folder / f"blow-{index}"


class Arm:
    """Puts a case's blows into this process, and so into the workers that it forks."""

    def __init__(self, case: Case, folder: Path, run: Path) -> None:
        self.folder, self.run = folder, run
        self.rank: int | None = None
        guarded = LocalWorker._guarded

        def known(worker: LocalWorker, *arguments: Any) -> int:
            self.rank = worker.rank
            for index, blow in enumerate(case.blows):
                if blow.point == "time" and self._falls(index, blow):
                    timer = threading.Timer(blow.number * TICK, self._strike, (index, blow))
                    timer.daemon = True
                    timer.start()
            return guarded(worker, *arguments)

        LocalWorker._guarded = known  # type: ignore[method-assign]
        for index, blow in enumerate(case.blows):
            if blow.point != "time":
                self._put(index, blow)

    def _put(self, index: int, blow: Blow) -> None:
        point = POINTS[blow.point]
        real: Callable[..., Any] = getattr(point.owner, point.name)
        calls = count()

        def fatal(*arguments: Any, **options: Any) -> Any:
            if not self._falls(index, blow) or next(calls) != blow.number:
                return real(*arguments, **options)
            if point.when == "before":
                self._strike(index, blow)
                return real(*arguments, **options)
            if point.when == "half":
                _half(point.name, *arguments)
            else:
                result = real(*arguments, **options)
            self._strike(index, blow)
            return result

        setattr(point.owner, point.name, fatal)

    def _falls(self, index: int, blow: Blow) -> bool:
        before = index == 0 or struck(self.folder, index - 1).exists()
        return self.rank == blow.rank and before and not struck(self.folder, index).exists()

    def _strike(self, index: int, blow: Blow) -> None:
        metrics = self.run / "metrics.jsonl"
        done = metrics.read_bytes().count(b'"loss"') if metrics.exists() else 0
        path = struck(self.folder, index)
        path.with_suffix(".new").write_text(f"{done} {time.monotonic()}")
        path.with_suffix(".new").rename(path)  # whoever sees it sees all of it
        os.kill(os.getpid(), blow.signal)


def _half(name: str, owner: Any, *arguments: Any) -> None:
    """The first half of what a call would have written."""
    if name == "append":
        descriptor, data = arguments
        os.write(descriptor, data[: len(data) // 2])
    else:
        os.write(owner._fd, b'{"step": 1, "lo')
