"""Cases of chaos: a run that is struck and goes on by itself, beside one that nothing strikes."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from megallama.checkpoint.store import Checkpoint, committed_checkpoints
from megallama.train.metrics import read_metrics
from tests.chaos.kills import LAYOUTS, RANKS, STEPS, Arm, Case, struck
from tests.conftest import LENGTH, losses
from tests.dist.commands import CONTEXT, Command, _run

#: Restarts without progress that a run is given: more than a case has blows.
RESTARTS = 8
#: Seconds after which a rank is called lost. A stopped one must be named 2 s later.
TIMEOUT = 3
#: Seconds that a case may take.
LIMIT = 90.0
SETTINGS = (f"train.steps={STEPS}", "checkpoint.every=2", "checkpoint.keep=2")


class Outcome(NamedTuple):
    """What became of a case: `faults` is empty where nothing was lost. `fell`: of its blows.

    `late`: for each rank that was stopped, seconds from the time limit after that to its naming.
    `stops`: for each request to stop, steps begun after it, and seconds from it to the exit.
    """

    case: Case
    faults: list[str]
    fell: int
    seconds: float
    late: list[float]
    stops: list[tuple[int, float]]


class Struck(Command):
    """A command with a case's blows in it."""

    def __init__(self, folder: Path, words: list[str], case: Case, run: Path) -> None:
        self.folder, self.words = folder, words
        folder.mkdir(parents=True, exist_ok=True)
        self.process = CONTEXT.Process(target=_armed, args=(str(folder), words, case, str(run)))
        self.process.start()


def _armed(folder: str, words: list[str], case: Case, run: str) -> None:
    Arm(case, Path(folder), Path(run))
    _run(folder, words, {"OMP_NUM_THREADS": "1"})


class Arena:
    """Where cases are fought out. `config`: of runs under `folder`/runs."""

    def __init__(self, folder: Path, config: Path) -> None:
        self.folder, self.config = folder, config
        self._references: dict[str, Path] = {}

    def fight(self, cases: Iterable[Case], at_once: int = 3) -> Iterator[Outcome]:
        """The outcomes of cases, a few side by side."""
        waiting = list(enumerate(cases))
        for layout in {case.layout for _, case in waiting} - set(self._references):
            self._references[layout] = self._reference(layout)
        going: list[Bout] = []
        try:
            while waiting or going:
                while waiting and len(going) < at_once:
                    number, case = waiting.pop(0)
                    going.append(Bout(self, f"{case.layout}-{number}", case))
                for bout in list(going):
                    if not bout.goes_on():
                        going.remove(bout)
                        yield bout.outcome(self._references[bout.case.layout])
                time.sleep(0.02)
        finally:
            for bout in going:
                bout.command.kill()

    def words(self, name: str, layout: str) -> list[str]:
        config = [str(self.config), f"run.name={name}", *SETTINGS, *LAYOUTS[layout]]
        return ["train", *config, f"parallel.timeout_seconds={TIMEOUT}"]

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def _reference(self, layout: str) -> Path:
        ended = Command(self.folder / "calm" / layout, self.words(layout, layout)).end()
        assert (ended.code, ended.error) == (0, ""), ended
        return self.run(layout)


class Bout:
    """One case on its way: started again by itself, or here where it was asked to stop."""

    def __init__(self, arena: Arena, name: str, case: Case) -> None:
        self.arena, self.name, self.case = arena, name, case
        self.run, self.folder = arena.run(name), arena.folder / "struck" / name
        self.words = [*arena.words(name, case.layout), "--restarts", str(RESTARTS)]
        self.stops: list[tuple[int, float]] = []
        self.named: dict[int, float] = {}  # blow → when its rank was called lost
        self.faults: list[str] = []
        self.began = time.monotonic()
        self._start()

    def _start(self) -> None:
        self.command = Struck(self.folder, self.words, self.case, self.run)

    def goes_on(self) -> bool:
        """Whether it runs. One that was stopped and saved is started again."""
        late = time.monotonic() - self.began > LIMIT
        running = self.command.running
        self._hear()
        if running and not late:
            return True
        self.ended = self.command.end(0)
        if late:
            self.faults.append(f"it did not end within {LIMIT:g} s")
        if self.ended.code == 75 and len(self.stops) < len(self.case.blows):
            self._check_stop()
            self._start()
            return True
        return False

    def outcome(self, reference: Path) -> Outcome:
        fell = sum(struck(self.folder, i).exists() for i in range(len(self.case.blows)))
        if self.ended.code:
            self.faults.append(f"exit code {self.ended.code}: {self.ended.error[-600:]}")
        else:
            self.faults += unlike(self.run, reference)
            self.faults += self._untold(fell)
        late = [at - self._struck(index)[1] - TIMEOUT for index, at in self.named.items()]
        return Outcome(
            self.case, self.faults, fell, time.monotonic() - self.began, late, self.stops
        )

    def _struck(self, index: int) -> tuple[int, float]:
        """The steps done when a blow fell, and the time."""
        done, when = struck(self.folder, index).read_text().split()
        return int(done), float(when)

    def _hear(self) -> None:
        """Note when a stopped rank is named."""
        for index, blow in enumerate(self.case.blows):
            if blow.signal != signal.SIGSTOP or index in self.named:
                continue
            if struck(self.folder, index).exists():
                told = (self.folder / "error").read_text().splitlines()
                before = [b.rank for b in self.case.blows[:index] if b.signal == blow.signal]
                if sum(f"rank {blow.rank} is lost" in x for x in told) > before.count(blow.rank):
                    self.named[index] = time.monotonic()

    def _check_stop(self) -> None:
        """A stop is heard in the step under way or the next, and saved."""
        heard, when = self._struck(len(self.stops))
        saved = committed_checkpoints(self.run / "checkpoints")[-1]
        step = Checkpoint(saved).manifest.state["step"]
        self.stops.append((max(0, step - heard - 1), time.monotonic() - when))
        if not heard <= step <= heard + 2:
            self.faults.append(f"asked to stop after step {heard}, saved step {step}")

    def _untold(self, fell: int) -> list[str]:
        """What should have been said of each blow that fell and was not.

        Of ranks that fall together, before their parent has ended the others, one is named: there
        are fewer restarts than blows.
        """
        told = self.ended.error
        faults = []
        for blow in self.case.blows[:fell]:
            step = r".*last step \d+\)" if RANKS[self.case.layout] > 1 else ".* by a signal"
            wanted = {
                signal.SIGKILL: rf"rank {blow.rank} was killed by SIGKILL",
                signal.SIGSTOP: rf"rank {blow.rank} is lost \(host [^)]+\): {step}",
            }.get(blow.signal, "")
            if not re.search(wanted, told):
                faults.append(f"{blow} fell, and {wanted!r} is not in {told!r}")
        together = fell - len(re.findall(r"; restart \d+ of ", told))
        return faults if len(faults) > together else []


def unlike(run: Path, reference: Path) -> list[str]:
    """How a run's rows, counters and final tensors differ from another's: not by a bit."""
    faults = []
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    if [row["step"] for row in rows] != list(range(1, STEPS + 1)):
        faults.append(f"rows of steps {[row['step'] for row in rows]}")
    batch = rows[0]["tokens"]
    if batch % LENGTH or [row["tokens"] for row in rows] != [batch * row["step"] for row in rows]:
        faults.append("tokens were repeated, skipped or lost")
    if losses(run) != losses(reference):
        faults.append("the rows differ from those of a run that nothing struck")
    ours, theirs = (
        Checkpoint(committed_checkpoints(path / "checkpoints")[-1]) for path in (run, reference)
    )
    ours.verify()
    if ours.manifest.state != theirs.manifest.state:
        faults.append(f"counters {ours.manifest.state}, not {theirs.manifest.state}")
    for name in theirs.manifest.tensors:
        if not torch.equal(ours.read(name), theirs.read(name)):
            faults.append(f"the final {name} differs")
    left = [path.name for path in run.iterdir() if path.name.startswith("writer.json")]
    return faults + [f"{name} was left behind" for name in left]
