"""What a job does next: `train NODES`, `relaunch`, `requeue [NODES TO LEAVE OUT]` or `stop CODE`.

Pure functions of what is known; the history is changed, for the caller to write. Each returns the
action and what to say of it.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megallama.errors import EXIT_LOST, EXIT_STOPPED
from megallama.train.slurm.attempt import Attempt, Health
from megallama.train.slurm.cause import blamed, why
from megallama.train.slurm.history import MOST_ALLOCATIONS, MOST_ATTEMPTS, History
from megallama.train.slurm.links import judge

#: SLURM's states of a job that may go on. Any other: it was cancelled, preempted or requeued. None
#: is known where the controller does not answer.
GOING_ON = ("RUNNING", "SUSPENDED", "")
#: Seconds by which a node's clock may be wrong.
SKEW = 10.0
#: A node's GPUs reduce at this share of the median node's speed at least.
SLOWEST = 0.8
#: Where this share of the nodes finished its look, who did not hangs. A dead node makes SLURM end
#: the looks of others.
MOST = 7 / 8
UNFINISHED = "did not finish looking at itself"
#: What the parent of local workers says where none of them said a word: another node's did.
CODE_ALONE = re.compile(r"ended with exit code \d+$")

Decision = tuple[str, str]


@dataclass(frozen=True)
class Job:
    """How the job stands: the signal that its script got, and its state and nodes in SLURM.

    `wanted`: the number of nodes that train.
    """

    wanted: int
    allocated: Sequence[str]
    asked: str = ""
    state: str = "RUNNING"

    @property
    def ends(self) -> bool:
        """Whether SLURM ends the job and decides itself what becomes of it."""
        return self.asked == "TERM" or self.state not in GOING_ON

    def candidates(self, history: History) -> list[str]:
        """The allocated nodes that may train."""
        return [node for node in self.allocated if not history.leaves_out(node)]


def choose(attempt: Attempt, job: Job, history: History, clock: tuple[float, float]) -> Decision:
    """The nodes that train: the first healthy ones of those allocated.

    `clock`: between which times, by the script's node, the nodes were asked.
    """
    if job.ends:
        return _ending(history, job)
    if job.asked:
        return _requeue(history, "the time limit is near")
    candidates = job.candidates(history)
    answered = [node for node in candidates if node in attempt.health]
    floor = _floor([attempt.health[node] for node in answered])
    faults = {node: _faults(attempt.health[node], floor, clock) for node in answered}
    if answered:
        silent = [node for node in candidates if node not in answered]
        faults |= {node: ["does not answer"] for node in silent}
    unfinished = [node for node in answered if not attempt.health[node].finished]
    if len(answered) - len(unfinished) >= MOST * len(candidates):
        for node in unfinished:
            faults[node].append(UNFINISHED)
    slow, unclear = judge({node: attempt.health[node].links for node in answered})
    for node in slow.keys() & faults.keys():
        faults[node].append(slow[node])
    bad = [node for node, found in faults.items() if found]
    words = [_known(node, history) for node in job.allocated if node not in candidates]
    found = [f"{node}: {'; '.join(faults[node])}" for node in bad]
    if len(bad) <= max(1, len(candidates) // 2):  # more of them have one cause that is elsewhere
        history.blame(bad)
        found = [f"{line}; left out" for line in found]
    words += found + [f"{node}: {UNFINISHED}" for node in unfinished if node not in bad]
    words += unclear
    healthy = [n for n in answered if n not in bad and attempt.health[n].finished]
    if len(healthy) >= job.wanted:
        return f"train {','.join(healthy[: job.wanted])}", "\n".join(words)
    action, last = _again(history, job, f"{len(healthy)} of {job.wanted} nodes are healthy")
    return action, "\n".join([*words, last])


def after(attempt: Attempt, job: Job, history: History, code: int, ranks_per_node: int) -> Decision:
    """What follows from the end of a training step for which srun returned `code`."""
    cause = why(attempt, code, job.asked)
    errors = sorted(attempt.errors.items(), key=lambda said: bool(CODE_ALONE.search(said[1])))
    words = [f"task {task}: {text}" for task, text in errors[:5]]
    if job.ends:
        return _ending(history, job)
    if cause not in (EXIT_STOPPED, EXIT_LOST):
        return f"stop {cause}", "\n".join([*words, f"job: ends with {cause}"])
    if cause == EXIT_STOPPED:
        return _requeue(history, "stopped after saving")
    bad = blamed(attempt, ranks_per_node)
    history.blame(bad)
    words += [f"{node}: lost or at fault; left out" for node in bad]
    action, last = _again(history, job, "a rank or node was lost")
    return action, "\n".join([*words, last])


def _ending(history: History, job: Job) -> Decision:
    history.forgive_allocation()
    return f"stop {EXIT_STOPPED}", f"job: SLURM ends it (state {job.state or 'unknown'})"


def _again(history: History, job: Job, reason: str) -> Decision:
    """Another attempt here where there are nodes and time for it, or else in another allocation."""
    possible = len(job.candidates(history)) >= job.wanted and not job.asked
    if possible and history.may_relaunch:
        count = f"{history.attempts} of {MOST_ATTEMPTS} without a newer checkpoint"
        return "relaunch", f"job: {reason}; starting again ({count})"
    return _requeue(history, reason)


def _requeue(history: History, reason: str) -> Decision:
    if not history.may_requeue:
        return f"stop {EXIT_LOST}", (
            f"job: {reason}; no checkpoint newer than {history.newest.name or 'the start'} in "
            f"{MOST_ALLOCATIONS} allocations: given up; see the logs, and submit it again"
        )
    return f"requeue {','.join(history.left_out)}".strip(), f"job: {reason}; back to the queue"


def _known(node: str, history: History) -> str:
    count = history.failed(node)
    times = "once" if count == 1 else f"{count} times"
    return f"{node}: failed {times} before; left out (history/)"


def _floor(all_health: Sequence[Health]) -> float:
    """The least all-reduce bandwidth in GB/s that a node may have."""
    measured = [health.bandwidth for health in all_health if health.bandwidth is not None]
    return SLOWEST * statistics.median(measured) if measured else 0.0


def _faults(health: Health, floor: float, clock: tuple[float, float]) -> list[str]:
    """What keeps a node from training."""
    found = list(health.faults)
    skew = max(clock[0] - health.time, health.time - clock[1])
    if skew > SKEW:
        found.append(f"its clock is wrong by {skew:.0f} s or more")
    if health.bandwidth is not None and health.bandwidth < floor:
        found.append(f"its GPUs reduce at {health.bandwidth:.0f} GB/s, below {floor:.0f}")
    return found
