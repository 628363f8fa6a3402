"""Messages between the ranks of one gloo group: posted together, then waited for.

gloo moves the bytes of a send when the matching receive is posted, and every receive here is posted
before any wait, so an exchange in which both sides take part cannot deadlock.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
from torch import Tensor

from megallama.dist.compat import Backend, Work
from megallama.errors import LostError

#: Tags: messages of one kind between two ranks arrive in the order in which they were sent.
COLLECTIVE, CHECK, POINT, POINT_CHECK, NOTHING = range(5)

#: Who waits for the operation decides when it took too long: see `connect`.
FOREVER = timedelta(days=365)

#: Rank of the group → the contiguous tensors that go to it or come from it.
Messages = Mapping[int, Sequence[Tensor]]


class Link:
    """The messages of one group. `members`: the global ranks of its ranks, for error messages."""

    def __init__(self, backend: Backend, name: str, rank: int, members: Sequence[int]) -> None:
        self._backend = backend
        self.name, self.rank, self.members = name, rank, tuple(members)
        #: The rank of the group for which the operation under way waits at this moment, and what it
        #: owes. That rank has not come to the operation: its messages are all posted at once.
        self.waiting: tuple[int, str] | None = None
        self.closed = False
        self._done: tuple[int, str] | None = None

    @property
    def done(self) -> str:
        """How many operations were completed, and the last of them: for errors."""
        return f"{self._done[0]} operations, the last {self._done[1]!r}" if self._done else "none"

    def complete(self, owed: str) -> None:
        """An operation is whole: every message of it arrived."""
        number = self._done[0] if self._done else 0
        words = re.sub("^to (take part in )?", "", owed)
        self._done = number + 1, words

    @property
    def size(self) -> int:
        return len(self.members)

    def peers(self) -> list[int]:
        """The other ranks, from the next one on: no two ranks begin with the same peer."""
        return [(self.rank + step) % self.size for step in range(1, self.size)]

    def post(self, owed: str, sends: Messages, receives: Messages, tag: int) -> Posted:
        """Start every message. Empty tensors do not travel.

        `owed`: what a peer that does not answer has left undone, for errors: "to send x".
        """
        posted = Posted(self, owed)
        for peer in reversed(self.peers()):  # the order in which their sends reach this rank
            for tensor in receives.get(peer, ()):
                if tensor.numel():
                    posted.receive(self._backend, tensor, peer, tag)
        for peer in self.peers():
            for tensor in sends.get(peer, ()):
                if tensor.numel():
                    posted.send(self._backend, tensor, peer, tag)
        return posted

    def exchange(self, owed: str, sends: Messages, receives: Messages, tag: int) -> None:
        """Start every message and wait for all of them."""
        self.post(owed, sends, receives, tag).finish()

    def lost(self, peer: int, owed: str, reason: str) -> LostError:
        """The error of a message that did not arrive."""
        reason = re.sub(r"^\[[^]]*\] ", "", reason.partition("\n")[0]).split(". ")[0]
        here, there = self.members[self.rank], self.members[peer]
        return LostError(
            f"group {self.name!r}: rank {here} waited for rank {there} {owed}, and it was lost or "
            f"gave up ({reason}); try again",
            peer=there,
            owed=owed,
        )

    def break_off(self) -> None:
        """Make every operation under way fail, here and on the peers that wait for this rank.

        gloo has no call for it, but a receive that times out closes the group's connections. One
        from a peer that is gone fails at once and closes nothing, so each is tried.
        """
        for peer in self.peers():
            try:
                work = self._backend.recv([torch.empty(1)], peer, NOTHING)
                work.wait(timedelta(milliseconds=1))
            except RuntimeError:
                continue  # as intended


class Posted:
    """Messages under way; it keeps their tensors alive."""

    def __init__(self, link: Link, owed: str) -> None:
        self._link, self._owed = link, owed
        self._receives: list[tuple[int, Work, Tensor]] = []
        self._sends: list[tuple[int, Work, Tensor]] = []

    def receive(self, backend: Backend, tensor: Tensor, peer: int, tag: int) -> None:
        try:
            self._receives.append((peer, backend.recv([tensor], peer, tag), tensor))
        except RuntimeError as error:
            raise self._link.lost(peer, self._owed, str(error)) from None

    def send(self, backend: Backend, tensor: Tensor, peer: int, tag: int) -> None:
        try:
            self._sends.append((peer, backend.send([tensor], peer, tag), tensor))
        except RuntimeError as error:
            raise self._link.lost(peer, self._owed, str(error)) from None

    def _wait(self, peer: int, work: Work) -> None:
        self._link.waiting = (peer, self._owed)
        try:
            work.wait(FOREVER)
        except RuntimeError as error:
            raise self._link.lost(peer, self._owed, str(error)) from None
        finally:
            self._link.waiting = None

    def arrived(self, peer: int) -> None:
        """Wait for everything that comes from `peer`."""
        for source, work, _ in self._receives:
            if source == peer:
                self._wait(peer, work)
        self._receives = [entry for entry in self._receives if entry[0] != peer]

    def finish(self) -> None:
        """Wait for everything."""
        for peer, work, _ in (*self._receives, *self._sends):
            self._wait(peer, work)
        self._receives, self._sends = [], []
        self._link.complete(self._owed)
