"""Why an attempt ended, and which nodes are to blame."""

from __future__ import annotations

import re
import signal
from collections import Counter
from collections.abc import Iterator

from megallama.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_LOST, EXIT_STOPPED
from megallama.train.slurm.attempt import Attempt

#: A shell's code for a command that a signal ended.
KILLED = 128
#: Signals that ask: a rank dies of one that arrives before it listens, while it imports.
ASKS = {KILLED + number for number in (signal.SIGUSR1, signal.SIGTERM)}
#: Who aborts has mostly lost a peer: NCCL's watchdog does.
ABORTED = KILLED + signal.SIGABRT
GOOD = (EXIT_DONE, EXIT_STOPPED, EXIT_INTERRUPTED)
#: What the errors of lost ranks and of damaged copies say of the rank at fault.
NAMED = re.compile(r"\brank (\d+) (?:is lost\b|\(host )")
#: What the parent of local workers says of one of them.
WORKER_KILLED = re.compile(r"\brank \d+ was killed by\b")


def why(attempt: Attempt, step_code: int, asked: str) -> int:
    """The exit code that an attempt ended with: the code of the tasks that no other one explains.

    `step_code`: srun's, which is the largest of all, those included that ended for want of a peer.
    `asked`: `USR1` where the ranks were asked to save before the time limit.
    """
    codes = {end.code for end in attempt.ends.values()}
    if asked:
        codes = {EXIT_STOPPED if code in ASKS else code for code in codes}
    if not codes:
        return EXIT_DONE if step_code == EXIT_DONE else EXIT_LOST
    if any(_killed(code) for code in codes):
        return EXIT_LOST
    causes = codes - {EXIT_LOST, ABORTED, *ASKS, *GOOD}
    if causes:
        return min(causes)
    return EXIT_LOST if codes - {*GOOD} else max(codes)


def blamed(attempt: Attempt, ranks_per_node: int) -> list[str]:
    """The nodes that an attempt was lost by, sorted; none where it was rather the network."""
    found = {
        *(end.node for end in attempt.ends.values() if _killed(end.code)),
        *_named(attempt, ranks_per_node),
        *_silent(attempt),
    }
    return sorted(found) if len(found) <= max(1, len(attempt.nodes) // 4) else []


def _killed(code: int) -> bool:
    """Whether a task was ended by a signal that no peer can bring about."""
    return code > KILLED and code not in ASKS | {ABORTED, EXIT_INTERRUPTED}


def _named(attempt: Attempt, ranks_per_node: int) -> Iterator[str]:
    for task, text in attempt.errors.items():
        if WORKER_KILLED.search(text):
            yield attempt.ends[task].node
        for rank in NAMED.findall(text):
            node = attempt.nodes.get(int(rank) // ranks_per_node)
            if node:
                yield node


def _silent(attempt: Attempt) -> Iterator[str]:
    """Nodes that left no word, where most did: they lost their power or their network.

    Where few said anything, SLURM ended the step, and knows itself which node was lost.
    """
    said = Counter(end.node for end in attempt.ends.values())
    if 2 * len(said) > len(attempt.nodes):
        yield from set(attempt.nodes.values()) - set(said)
