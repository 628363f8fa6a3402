"""What a run remembers from attempt to attempt: RUN_DIR/slurm/history.json.

It bounds the attempts that bring no newer checkpoint, and knows the nodes that failed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from megallama.checkpoint.manifest import MANIFEST
from megallama.errors import CorruptError
from megallama.files import refuse_os_errors, write_atomic
from megallama.train.slurm.attempt import Attempt

FILE = "history.json"
#: Attempts in one allocation, and allocations of a job, that may fail in a row without a newer
#: checkpoint.
MOST_ATTEMPTS, MOST_ALLOCATIONS = 3, 5
#: Failures after which a node is left out of every job of the run. One is enough for its own job.
MOST_FAILURES = 3
#: Jobs that are remembered: one that is submitted by mistake must not wipe the memory of another.
MOST_JOBS = 4


class Saved(NamedTuple):
    """When the checkpoint that was written last was written, in ns since 1970, and its name."""

    time: int = 0
    name: str = ""


NOTHING = Saved()


@dataclass
class Counts:
    """Of one job, since the newest checkpoint; `bad`: the nodes that failed in it."""

    restarts: int = 0
    attempts: int = 0
    allocations: int = 0
    bad: list[str] = field(default_factory=list)


@dataclass
class History:
    """What each of the last jobs counted, and nodes that failed. `job`: the one that asks."""

    job: str = ""
    newest: Saved = NOTHING
    #: Node → how often it failed, over all jobs. Remove a node's line once it is repaired.
    failures: dict[str, int] = field(default_factory=dict)
    #: Job → its counts; the one that began last is the last.
    jobs: dict[str, Counts] = field(default_factory=dict)

    @property
    def counts(self) -> Counts:
        """Those of the job that asks."""
        return self.jobs.setdefault(self.job, Counts())

    def begin(self, attempt: Attempt, newest: Saved) -> None:
        """Count an attempt that starts from the checkpoint `newest`."""
        self.job = attempt.job
        counts = self.jobs.pop(self.job, None)
        if counts is None:
            counts = Counts(allocations=1)
        elif attempt.restarts != counts.restarts:
            counts.allocations, counts.attempts = counts.allocations + 1, 0
        counts.restarts = attempt.restarts
        self.jobs = dict([*self.jobs.items(), (self.job, counts)][-MOST_JOBS:])
        self.see(newest)
        counts.attempts += 1

    def see(self, newest: Saved) -> None:
        """Count from here on, where there is a newer checkpoint: one written later. A name tells
        nothing: behind a damaged checkpoint a run saves smaller steps, and a spike deletes some."""
        if newest.time > self.newest.time:
            self.newest = newest
            for counts in self.jobs.values():
                counts.attempts, counts.allocations = 0, 1

    def forgive_allocation(self) -> None:
        """This allocation did not fail: SLURM took it away."""
        self.counts.allocations -= 1

    def blame(self, nodes: Iterable[str]) -> None:
        """Leave nodes out of this job, and after a few times of all."""
        for node in nodes:
            self.failures[node] = self.failures.get(node, 0) + 1
            if node not in self.counts.bad:
                self.counts.bad.append(node)

    def leaves_out(self, node: str) -> bool:
        return node in self.counts.bad or self.failures.get(node, 0) >= MOST_FAILURES

    @property
    def left_out(self) -> list[str]:
        """Every node that is left out, sorted."""
        nodes = {*self.counts.bad, *self.failures}
        return sorted(node for node in nodes if self.leaves_out(node))

    @property
    def may_relaunch(self) -> bool:
        return self.counts.attempts < MOST_ATTEMPTS

    @property
    def may_requeue(self) -> bool:
        return self.counts.allocations < MOST_ALLOCATIONS

    def write(self, work: Path) -> None:
        """Raises ConfigError where the system refuses."""
        content = {name: value for name, value in asdict(self).items() if name != "job"}
        write_atomic(work / FILE, json.dumps(content, indent=1).encode())


def read_history(work: Path, job: str) -> History:
    """The history of a run, which `job` asks for; a new one where there is none.

    Raises:
        CorruptError: the file is not one.
    """
    path = work / FILE
    with refuse_os_errors("read", path):
        if not path.exists():
            return History(job)
        content = path.read_bytes()
    try:
        fields = json.loads(content)
        fields["newest"] = Saved(*fields["newest"])
        fields["jobs"] = {name: Counts(**counts) for name, counts in fields["jobs"].items()}
        return History(job, **fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptError(f"{path}: is no history of a run ({error}); remove it") from None


def newest_checkpoint(work: Path) -> Saved:
    """The checkpoint of the run that was written last. Imports no torch: seconds count."""
    found = NOTHING
    for manifest in (work.parent / "checkpoints").glob(f"step-*/{MANIFEST}"):
        with suppress(OSError):  # it was deleted just now
            found = max(found, Saved(manifest.stat().st_mtime_ns, manifest.parent.name))
    return found
