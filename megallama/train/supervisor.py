"""Local workers under one parent: the first failure's code is the job's, and nobody lingers.

torchrun turns every failing code into 1 and lets survivors wait for their dead peer. Here the
parent forks the workers, passes signals on, and ends all of them when one fails. Where one was lost
it may start all of them again.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from megallama.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_LOST,
    EXIT_STOPPED,
    LostError,
    UserError,
    said_by,
)
from megallama.files import refuse_os_errors
from megallama.train.inbox import Inbox
from megallama.train.local_worker import LAST_WORDS, Failure, LocalWorker, Work
from megallama.train.signals import CODES, StopSignals

#: Codes of a worker that ended as it should: the largest is the job's.
GOOD_CODES = (EXIT_DONE, EXIT_STOPPED, EXIT_INTERRUPTED)
#: Seconds to wait after the first failure, by the weight of the likeliest cause so far. Who was
#: killed said nothing of what it owed: its peers agree on that in little more than a second.
PATIENCE = (2.0, 1.0, 5.0)
#: The same while the likeliest cause is a code without a word, or a loss that rank 0 may explain:
#: one process of a job on several nodes says the words of all that met the same, and it does so
#: last where it hosts the store.
UNSAID = LAST_WORDS.total_seconds() + 2
#: Seconds to wait once all who are left were called lost by the others: for a worker that is
#: stopped says nothing more, and one that failed says so soon.
LEFT = 0.5
#: Seconds that workers have to leave after a second Ctrl-C.
HURRY = 1.0


def supervise(
    count: int,
    work: Work,
    again: Callable[[LostError], Work | None] = lambda error: None,
    silence: float = math.inf,
    first: int = 0,
) -> int:
    """Do `work` in `count` workers; return 0, or 130 or 75 if any was stopped by a signal.

    Where a worker raised something unexpected, its traceback is printed, and 1 returned. Where one
    was lost (69, or killed), `again` may give the work that new workers are to do; workers that
    were asked to stop are not replaced. A lone worker that is stopped (SIGSTOP) for `silence`
    seconds is lost, as one among several is to the others. `first`: the rank of the first worker in
    the job, which may have workers on other nodes; failures are told by their ranks there.

    Raises:
        UserError: as the first failing worker raised it; the others were killed.
        LostError: a worker was killed by a signal, or could not be started.
        KeyboardInterrupt: Ctrl-C was pressed twice.
        BrokenPipeError: nobody reads the output any more.
    """
    with StopSignals() as stop:
        # Forked from a parent that has torch and the job's modules, 8 workers start in 0.1 s; each
        # would take seconds to import them. This is safe because the parent starts no thread, runs
        # no tensor operation and asks CUDA for nothing before the forks.
        import megallama.train.job  # noqa: F401

        while True:
            with Inbox() as inbox, _folder() as folder:
                if stop.code is not None:  # nothing has run since that would need saving
                    return stop.code
                team = Team(inbox, silence if count == 1 else math.inf, first)
                try:
                    team.start(count, work, Path(folder) / "store")
                    team.wait()
                finally:
                    team.kill()
            try:
                return team.outcome()
            except LostError as error:
                following = None
                if error.exit_code == EXIT_LOST and not team.asked_to_stop:
                    following = again(error)
                if following is None:
                    raise
                work = following


def _folder() -> tempfile.TemporaryDirectory[str]:
    """Where the workers' store is a file.

    No server: on a machine whose name service does not answer, one connection in twelve to a
    TCPStore took five seconds.
    """
    with refuse_os_errors("write", Path(tempfile.gettempdir())):
        return tempfile.TemporaryDirectory(prefix="megallama-", ignore_cleanup_errors=True)


class Team:
    """The workers, and what became of them."""

    def __init__(self, inbox: Inbox, silence: float = math.inf, first: int = 0) -> None:
        self.inbox, self.silence, self.first = inbox, silence, first
        self.alive: dict[int, int] = {}  # process id → rank in the job
        self.stopped: dict[int, float] = {}  # process id → since when
        self.code = EXIT_DONE
        self.failures: list[Failure] = []
        self.interrupts = 0
        self.asked_to_stop = False

    def start(self, count: int, work: Work, store: Path) -> None:
        """Fork the workers. A signal that arrives meanwhile waits in the inbox for all of them.

        Raises:
            LostError: the system has no room for one more process.
        """
        sys.stdout.flush()  # or every worker would write what is still in the buffer
        sys.stderr.flush()
        parent = os.getpid()
        # A worker's signals wait until its own handlers are there.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, CODES)
        try:
            for rank in range(count):
                pid = os.fork()
                if pid == 0:
                    try:
                        self.inbox.leave_to_parent()
                        LocalWorker(rank, count, store, self.inbox.sender).live(work, parent)
                    finally:
                        os._exit(EXIT_FAILED)  # whatever happens, the stack is the parent's
                self.alive[pid] = self.first + rank
                with suppress(OSError):  # as the worker does: whoever comes first
                    os.setpgid(pid, pid)
        except OSError as error:
            raise LostError(
                f"--nproc {count}: worker {len(self.alive)} cannot be started "
                f"({error.strerror}); ask for fewer or free the machine"
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def wait(self) -> None:
        """Pass signals on until every worker ended, or one failed and its cause is known."""
        began: dict[str, float] = {}  # what limits the wait → since when
        while self.alive:
            now = time.monotonic()
            ends = [began.setdefault(name, now) + wait for name, wait in self._limits().items()]
            for pid, since in self.stopped.items():
                if now >= since + self.silence:
                    self.failures.append(_stopped(self.alive[pid], self.silence))
                    return
                ends.append(since + self.silence)
            limit = min(ends, default=math.inf) - now
            if limit <= 0:
                return
            self.inbox.wait(None if limit == math.inf else limit)
            self._forward(self.inbox.signals())
            self._reap()

    def _limits(self) -> dict[str, float]:
        """For how many seconds to wait yet, by the reason, from when it first holds."""
        if self.interrupts > 1:
            return {"hurry": HURRY}
        if not self.failures:
            return {}
        cause = self._cause()
        silent = any(failure.kind == "code" for failure in self.failures)
        hosted = 0 in self.alive.values() and cause.weight == 2
        if cause.kind == "code" or (silent and hosted):
            return {"unsaid": UNSAID}
        limits = {"failure": PATIENCE[cause.weight]}
        lost = [failure.text for failure in self.failures if failure.code == EXIT_LOST]
        if all(any(f"rank {rank} is lost" in t for t in lost) for rank in self.alive.values()):
            limits["left"] = LEFT
        return limits

    def kill(self) -> None:
        """End whoever is left, with what it started, and collect it."""
        for pid in self.alive:
            with suppress(ProcessLookupError, PermissionError):  # it ended, uncollected
                os.killpg(pid, signal.SIGKILL)
        while self.alive:
            pid = next(iter(self.alive))
            os.waitpid(pid, 0)
            del self.alive[pid]

    def outcome(self) -> int:
        """Return or raise what `supervise` does."""
        cause = self._cause() if self.failures else None
        if self.interrupts > 1 or (cause and cause.kind == "interrupt"):
            raise KeyboardInterrupt
        if cause is None:
            return self.code
        if cause.kind == "pipe":
            raise BrokenPipeError
        if cause.kind == "traceback":
            print(f"rank {cause.rank}: {cause.text}", end="", file=sys.stderr)
            return cause.code
        raise self._error(cause)

    def _forward(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            if number in CODES:
                self.asked_to_stop = True
                self.interrupts += number == signal.SIGINT
                for pid in self.alive:
                    os.kill(pid, number)  # not collected yet, so the id is still the worker's

    def _reap(self) -> None:
        """Collect whoever ended."""
        flags = os.WNOHANG | os.WUNTRACED | os.WCONTINUED
        ended = [os.waitpid(pid, flags) for pid in self.alive]
        # A worker reports before it ends: what those who ended had to say is here by now.
        for report in self.inbox.reports():
            self.failures.append(replace(report, rank=self.first + report.rank))
        for pid, status in ended:
            if pid == 0:  # it still runs
                continue
            self.stopped.pop(pid, None)
            if os.WIFSTOPPED(status):
                self.stopped[pid] = time.monotonic()
            if os.WIFSTOPPED(status) or os.WIFCONTINUED(status):
                continue
            rank, code = self.alive.pop(pid), os.waitstatus_to_exitcode(status)
            if code < 0:
                self.failures.append(_killed(rank, -code))
            elif code in GOOD_CODES:
                self.code = max(self.code, code)
            elif all(failure.rank != rank for failure in self.failures):
                text = f"rank {rank} ended with exit code {code}"
                self.failures.append(Failure(rank, code, text, "code"))

    def _cause(self) -> Failure:
        """The first of the failures that hardly follow from another one."""
        return min(self.failures, key=lambda failure: (failure.weight, failure.kind == "code"))

    def _error(self, cause: Failure) -> UserError:
        """The cause as an error. It names its rank unless the ranks agree and rank 0 is of them."""
        similar = [failure for failure in self.failures if failure.weight == cause.weight]
        agreed = {failure.text for failure in similar} == {cause.text}
        shared = agreed and any(failure.rank == 0 for failure in similar)
        own = shared or cause.kind not in ("error", "follows")
        text = cause.text if own else said_by(cause.rank, cause.text)
        kinds = {kind.exit_code: kind for kind in UserError.__subclasses__()}
        kind = kinds.get(cause.code, UserError) if cause.kind == "error" else LostError
        verdicts = (
            f.text for f in self.failures if f.text.startswith(f"rank {cause.rank} is lost")
        )
        words = "; ".join([text, *dict.fromkeys(verdicts)])
        error = kind(words)
        error.exit_code = cause.code
        return error


def _stopped(rank: int, seconds: float) -> Failure:
    host = socket.gethostname()
    text = f"rank {rank} is lost (host {host}): it has been stopped by a signal for {seconds:g} s"
    return Failure(rank, EXIT_LOST, text, signal.SIGSTOP.name)


def _killed(rank: int, number: int) -> Failure:
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    text = f"rank {rank} was killed by {name}"
    if number == signal.SIGKILL:
        text += ", maybe for want of memory: dmesg tells"
    return Failure(rank, EXIT_LOST, text, name)
