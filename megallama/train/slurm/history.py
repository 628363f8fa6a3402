"""What a run remembers from attempt to attempt: RUN_DIR/slurm/history.json.

It bounds the attempts that bring no newer checkpoint, and knows the nodes that failed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

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


@dataclass
class History:
    """Counts since the newest checkpoint, and nodes that failed."""

    job: str = ""
    restarts: int = 0
    newest: str = ""
    attempts: int = 0
    allocations: int = 0
    #: Node → how often it failed, over all jobs. Remove a node's line once it is repaired.
    failures: dict[str, int] = field(default_factory=dict)
    #: The nodes that failed in this job.
    bad: list[str] = field(default_factory=list)

    def begin(self, attempt: Attempt, newest: str) -> None:
        """Count an attempt that starts from the checkpoint `newest`."""
        if attempt.job != self.job:
            self.job, self.bad, self.allocations, self.attempts = attempt.job, [], 1, 0
        elif attempt.restarts != self.restarts:
            self.allocations, self.attempts = self.allocations + 1, 0
        self.restarts = attempt.restarts
        self.see(newest)
        self.attempts += 1

    def see(self, newest: str) -> None:
        """Count from here on, where there is a newer checkpoint."""
        if newest != self.newest:
            self.newest, self.attempts, self.allocations = newest, 0, 1

    def blame(self, nodes: Iterable[str]) -> None:
        """Leave nodes out of this job, and after a few times of all."""
        for node in nodes:
            self.failures[node] = self.failures.get(node, 0) + 1
            if node not in self.bad:
                self.bad.append(node)

    def leaves_out(self, node: str) -> bool:
        return node in self.bad or self.failures.get(node, 0) >= MOST_FAILURES

    @property
    def left_out(self) -> list[str]:
        """Every node that is left out, sorted."""
        return sorted(node for node in {*self.bad, *self.failures} if self.leaves_out(node))

    @property
    def may_relaunch(self) -> bool:
        return self.attempts < MOST_ATTEMPTS

    @property
    def may_requeue(self) -> bool:
        return self.allocations < MOST_ALLOCATIONS

    def write(self, work: Path) -> None:
        write_atomic(work / FILE, json.dumps(asdict(self), indent=1).encode())


def read_history(work: Path) -> History:
    """The history of a run; a new one where there is none.

    Raises:
        CorruptError: the file is not one.
    """
    path = work / FILE
    with refuse_os_errors("read", path):
        if not path.exists():
            return History()
        content = path.read_bytes()
    try:
        return History(**json.loads(content))
    except (ValueError, TypeError) as error:
        raise CorruptError(f"{path}: is no history of a run ({error}); remove it") from None


def newest_checkpoint(work: Path) -> str:
    """The name of the newest checkpoint of the run, or nothing. Imports no torch: seconds count."""
    committed = (work.parent / "checkpoints").glob(f"step-*/{MANIFEST}")
    return max((path.parent.name for path in committed), default="")
