"""Ranks that are slow: all take equally long over a step, because all wait for the slowest.

What tells them apart is the time that each did not wait for another. A rank's figure is its median
over a stretch of steps, so that a single hiccup counts for nothing.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from statistics import median

import torch

from megallama.train.build import Trainer
from megallama.train.host import read_back
from megallama.train.meeting import Meeting

#: Times the median of all ranks from which one is called slow.
SLOW = 1.3


class Stragglers:
    """Gathers the ranks' own times every `every` steps, and names who is slow through `say`.

    On NCCL the host does not wait and its times say nothing: there it is off.
    """

    def __init__(
        self, trainer: Trainer, meeting: Meeting, every: int, say: Callable[[str], None]
    ) -> None:
        grid = trainer.place.grid
        self.every = every if grid.size > 1 else 0
        self.watch = trainer.groups.watch
        self.world, self.rank, self.size = trainer.groups["world"], trainer.place.rank, grid.size
        self.meeting, self._say = meeting, say
        self._own: list[float] = []
        self._waited = 0.0

    def before(self) -> None:
        """A step begins."""
        if self.watch is not None:
            self._waited = self.watch.waited

    def after(self, step: int, seconds: float) -> None:
        """A step took so long. All ranks call it alike, for some of the calls are collectives."""
        if not self.every or self.watch is None:
            return
        self._own.append(seconds - (self.watch.waited - self._waited))
        if step % self.every:
            return
        mine = torch.zeros(self.size, dtype=torch.float64)
        mine[self.rank] = median(self._own)
        (times,) = read_back(mine, over=self.world)
        steps, self._own = len(self._own), []
        if slow := slow_ranks(times):
            hosts = json.loads(self.meeting.hold(socket.gethostname, json.dumps))
            for rank in slow:
                self._say(
                    f"rank {rank} (host {hosts[rank]}) is slow: {times[rank]:.3g} s of its own in "
                    f"each of {steps} steps, {times[rank] / median(times):.2f} times the median"
                )


def slow_ranks(times: Sequence[float]) -> list[int]:
    """The ranks that take over `SLOW` times the median."""
    usual = median(times)
    return [rank for rank, seconds in enumerate(times) if seconds > SLOW * usual]
