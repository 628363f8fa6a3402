"""Requests to stop: a signal sets a flag, and the loop looks at it between two steps."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from megallama.errors import EXIT_INTERRUPTED, EXIT_STOPPED

#: Signal → the exit code once everything is saved: a scheduler's request asks to be requeued, a
#: person's does not.
CODES = {
    signal.SIGTERM: EXIT_STOPPED,
    signal.SIGUSR1: EXIT_STOPPED,
    signal.SIGINT: EXIT_INTERRUPTED,
}


class StopSignals:
    """While entered, SIGTERM, SIGUSR1 and Ctrl-C set `code` instead of ending the process.

    A second Ctrl-C ends it at once: the person is sure.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> StopSignals:
        for number in CODES:
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
