"""What the parent of local workers waits for: signals, and the workers' reports."""

from __future__ import annotations

import json
import select
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress

from megallama.train.local_worker import REPORT_LENGTH, Failure
from megallama.train.signals import heeded

#: Bytes of a whole report: JSON writes up to six for a character.
REPORT_BYTES = 8 * REPORT_LENGTH


class Inbox:
    """While entered, signals and the workers' reports arrive here and interrupt nothing."""

    def __enter__(self) -> Inbox:
        # Datagrams: whole messages from any number of workers, in the order of sending.
        self._reports, self.sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, REPORT_BYTES)
        self._signals, self._waker = socket.socketpair()
        for end in (self._reports, self._signals, self._waker):
            end.setblocking(False)
        # Python writes the number of every signal that has a handler to this socket.
        self._wakeup = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        numbers = (*heeded(), signal.SIGCHLD)
        self._handlers = {n: signal.signal(n, lambda number, frame: None) for n in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        for end in (self._reports, self.sender, self._signals, self._waker):
            end.close()

    def leave_to_parent(self) -> None:
        """In a worker: signals are its own from here on, and it may only send."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for end in (self._reports, self._signals, self._waker):
            end.close()

    def wait(self, seconds: float | None) -> None:
        select.select([self._reports, self._signals], [], [], seconds)

    def signals(self) -> bytes:
        """The numbers of the signals that arrived since the last call, in their order."""
        with suppress(BlockingIOError):
            return self._signals.recv(4096)
        return b""

    def reports(self) -> Iterator[Failure]:
        """The reports that arrived since the last call."""
        with suppress(BlockingIOError):
            while True:
                yield Failure(**json.loads(self._reports.recv(REPORT_BYTES)))
