"""A local worker's own side: it does its work, and reports a failure before it ends."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from megallama.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_LOST, UserError
from megallama.train.process import STORE_TIMEOUT, Process
from megallama.train.signals import CODES, StopSignals

Work = Callable[[Process, StopSignals], int]

LOCALHOST = "127.0.0.1"
#: How long a failing process that hosts a job's store waits for the others' last use of it, before
#: it says what happened.
LAST_WORDS = timedelta(seconds=10)
#: Characters of a report's text: the end of a longer one.
REPORT_LENGTH = 16_000
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Failure:
    """A worker that did not end as it should."""

    rank: int  # in the job, once the supervisor has it; a worker counts those of its node
    code: int
    text: str
    #: `error` for a UserError, `follows` for one that another process's end may have brought about,
    #: `traceback`, `interrupt`, `pipe`, `code` or a signal's name.
    kind: str

    @property
    def weight(self) -> int:
        """0: no peer can bring it about; 1: hardly; 2: it mostly follows from another failure.

        Survivors may report a lost peer before the system reports the peer's death, and
        communication libraries abort when their peer is gone. Of the processes of several nodes
        one says what all lost, and the others end with the code alone.
        """
        if self.kind in ("SIGABRT", "follows") or (self.kind == "code" and self.code == EXIT_LOST):
            return 2
        return 0 if self.kind.startswith("SIG") else 1


class LocalWorker:
    """One worker, in its own process."""

    def __init__(self, rank: int, count: int, store: Path, sender: socket.socket) -> None:
        self.rank, self.count, self.store, self.sender = rank, count, store, sender

    def live(self, work: Work, parent: int) -> NoReturn:
        """Do the work and leave: nothing of the parent's stack, and none of its exit handlers,
        is for this process."""
        code = EXIT_FAILED
        try:
            os.setpgid(0, 0)  # Ctrl-C at the terminal is for the parent alone
            _die_with(parent)
            with StopSignals() as stop:
                code = self._guarded(work, stop)
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    stream.flush()
            os._exit(code)

    def _guarded(self, work: Work, stop: StopSignals) -> int:
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, CODES)
            return work(self._process(), stop)
        except UserError as error:
            kind = "follows" if error.follows else "error"
            return self._report(error.exit_code, str(error), kind)
        except KeyboardInterrupt:
            return self._report(EXIT_INTERRUPTED, "", "interrupt")
        except BrokenPipeError:
            return self._report(EXIT_DONE, "", "pipe")
        except BaseException:
            return self._report(EXIT_FAILED, traceback.format_exc(), "traceback")

    def _process(self) -> Process:
        import torch
        from torch.distributed import FileStore  # type: ignore[attr-defined]

        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, _cores() // self.count))
        store = FileStore(str(self.store), self.count)
        store.set_timeout(STORE_TIMEOUT)
        return Process(self.rank, self.count, self.rank, self.count, store, LOCALHOST)

    def _report(self, code: int, text: str, kind: str) -> int:
        failure = Failure(self.rank, code, text[-REPORT_LENGTH:], kind)
        with suppress(OSError):  # the parent is gone, or leaves
            self.sender.send(json.dumps(asdict(failure)).encode())
        return code


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _die_with(parent: int) -> None:
    """On Linux, ask to be killed when the parent ends, even by SIGKILL."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the request
        os._exit(EXIT_LOST)
