"""Process groups. A group is an argument, never a global: whoever communicates was handed it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from megallama.dist.handle import Done, Handle


class Group(Protocol):
    """An ordered stream of collectives among `size` ranks."""

    rank: int
    size: int

    def all_gather(self, x_tD: Tensor) -> Handle[Tensor]:
        """Shards stacked along dim 0 in rank order: (t, D) → (T, D)."""
        ...

    def reduce_scatter(self, x_TD: Tensor) -> Handle[Tensor]:
        """The sum over ranks, of which each keeps its rows: (T, D) → (t, D)."""
        ...


class SingleGroup:
    """The group of one process: every collective has its result at once and moves no bytes.

    Its handles still call themselves collectives, so that a pass runs in the order of larger groups.
    """

    rank = 0
    size = 1

    def all_gather(self, x_tD: Tensor) -> Handle[Tensor]:
        return Done(x_tD, collective=True)

    def reduce_scatter(self, x_TD: Tensor) -> Handle[Tensor]:
        return Done(x_TD, collective=True)
