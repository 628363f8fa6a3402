"""Requests to stop, by a signal or a file: they set a flag that the loop looks at between steps."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType

from megallama.errors import EXIT_INTERRUPTED, EXIT_STOPPED

#: Signal → the exit code once everything is saved: a scheduler's request, and the loss of the
#: terminal, ask to be started again; a person's does not.
CODES = {
    signal.SIGTERM: EXIT_STOPPED,
    signal.SIGUSR1: EXIT_STOPPED,
    signal.SIGHUP: EXIT_STOPPED,
    signal.SIGINT: EXIT_INTERRUPTED,
}


def heeded() -> list[signal.Signals]:
    """The keys of `CODES`, without SIGHUP where it is ignored: `nohup` asks for that, and forked
    workers inherit it."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in CODES if number != signal.SIGHUP or not ignored]


class StopSignals:
    """While entered, the signals of `heeded` set `code` instead of ending the process.

    A second Ctrl-C ends it at once: the person is sure.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> StopSignals:
        for number in heeded():
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.code == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        if self.code != EXIT_INTERRUPTED:  # what a person asked for, a scheduler does not undo
            self.code = CODES[signal.Signals(number)]


class StopFile:
    """`RUN_DIR/stop`, which anyone may make who can write there: as Ctrl-C, from another machine.

    One rank looks for it, at most once in `SECONDS`: a look at a shared file system may take a
    millisecond.
    """

    SECONDS = 1.0

    def __init__(self, directory: Path) -> None:
        self.path = directory / "stop"
        self._next, self._seen = 0.0, False

    def asked(self) -> bool:
        """Whether it is there, or was."""
        if not self._seen and time.monotonic() >= self._next:
            self._next = time.monotonic() + self.SECONDS
            with suppress(OSError):
                self._seen = self.path.exists()
        return self._seen

    def heard(self) -> None:
        """Remove it, once everything is saved: the run may be started again."""
        with suppress(OSError):
            self.path.unlink()
