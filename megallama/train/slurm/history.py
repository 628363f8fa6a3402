"""What a run remembers from attempt to attempt: RUN_DIR/slurm/history/JOB.json.

It bounds the attempts that bring no newer checkpoint, and knows the nodes that failed. Each job
writes its own file and reads all: of two that are there at once, neither undoes the other's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from megallama.checkpoint.folder import NOTHING, Saved, last_written
from megallama.errors import CorruptError
from megallama.files import refuse_os_errors, write_atomic
from megallama.train.slurm.attempt import Attempt

FOLDER = "history"
#: Attempts in one allocation, and allocations of a job, that may fail in a row without a newer
#: checkpoint.
MOST_ATTEMPTS, MOST_ALLOCATIONS = 3, 5
#: Failures after which a node is left out of every job of the run. One is enough for its own job.
MOST_FAILURES = 3


@dataclass
class History:
    """What a job counted since the newest checkpoint, and nodes that failed.

    `restarts`: of its last attempt; before the first -1. `bad`: nodes that failed in this job.
    """

    job: str = ""
    newest: Saved = NOTHING
    restarts: int = -1
    attempts: int = 0
    allocations: int = 0
    bad: list[str] = field(default_factory=list)
    #: Node → how often it failed in this job. Remove a node's lines once it is repaired.
    failures: dict[str, int] = field(default_factory=dict)
    #: The same of the run's other jobs, whose files these are: it is not written.
    elsewhere: Mapping[str, int] = field(default_factory=dict)

    def begin(self, attempt: Attempt, newest: Saved) -> None:
        """Count an attempt that starts from the checkpoint `newest`."""
        if attempt.restarts != self.restarts:
            self.allocations, self.attempts = self.allocations + 1, 0
        self.restarts = attempt.restarts
        self.see(newest)
        self.attempts += 1

    def see(self, newest: Saved) -> None:
        """Count from here on, where there is a newer checkpoint: one written later."""
        if newest.time > self.newest.time:
            self.newest, self.attempts, self.allocations = newest, 0, 1

    def forgive_allocation(self) -> None:
        """This allocation did not fail: SLURM took it away."""
        self.allocations -= 1

    def blame(self, nodes: Iterable[str]) -> None:
        """Leave nodes out of this job, and after a few times of all."""
        for node in nodes:
            self.failures[node] = self.failures.get(node, 0) + 1
            if node not in self.bad:
                self.bad.append(node)

    def failed(self, node: str) -> int:
        """How often a node did, over all jobs of the run."""
        return self.failures.get(node, 0) + self.elsewhere.get(node, 0)

    def leaves_out(self, node: str) -> bool:
        return node in self.bad or self.failed(node) >= MOST_FAILURES

    @property
    def left_out(self) -> list[str]:
        """Every node that is left out, sorted."""
        nodes = {*self.bad, *self.failures, *self.elsewhere}
        return sorted(node for node in nodes if self.leaves_out(node))

    @property
    def may_relaunch(self) -> bool:
        return self.attempts < MOST_ATTEMPTS

    @property
    def may_requeue(self) -> bool:
        return self.allocations < MOST_ALLOCATIONS

    def write(self, work: Path) -> None:
        """Raises ConfigError where the system refuses."""
        content = {k: v for k, v in asdict(self).items() if k not in ("job", "elsewhere")}
        write_atomic(work / FOLDER / f"{self.job}.json", json.dumps(content, indent=1).encode())


def read_history(work: Path, job: str) -> History:
    """What `job` counted, and what all jobs of the run know of nodes.

    Raises:
        CorruptError: a file is no history.
    """
    found = {path.stem: _read(path) for path in sorted((work / FOLDER).glob("*.json"))}
    own = found.pop(job, History(job))
    elsewhere: Counter[str] = Counter()
    for other in found.values():
        elsewhere.update(other.failures)
    return replace(own, elsewhere=elsewhere)


def _read(path: Path) -> History:
    with refuse_os_errors("read", path):
        content = path.read_bytes()
    try:
        fields = json.loads(content)
        fields["newest"] = Saved(*fields["newest"])
        fields["failures"] = {node: int(count) for node, count in fields["failures"].items()}
        return History(path.stem, **fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptError(f"{path}: is no history of a job ({error}); remove it") from None


def newest_checkpoint(work: Path) -> Saved:
    """The checkpoint of the run that was written last. Raises UserError."""
    return last_written(work.parent / "checkpoints")
