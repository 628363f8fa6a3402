"""Process groups. A group is an argument, never a global: whoever communicates was handed it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megallama.dist.handle import Done, Handle

#: What the handle of an all-gather or a reduce-scatter says of itself, and that of an all-reduce.
COVER, COVER_ALL_REDUCE = 1, 2


class Group(Protocol):
    """An ordered stream of operations among `size` ranks, of which this process is `rank`.

    Operations of one group run one at a time, in the order in which they were issued, so all ranks
    must issue the same collectives in the same order. Operations of different groups run
    independently. Tensors that were passed in stay as they are until the handle is waited for.

    `wire` is the dtype that travels; None is the tensor's own. Every contribution is rounded to it,
    this rank's too, so that the result does not depend on which rank does the sum.

    A peer that went away or did not answer in time raises LostError from a handle's `wait`. A shape
    that does not divide, or a peer that is no rank of the group, is a bug and raises ValueError.
    """

    name: str
    rank: int
    size: int

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Handle[Tensor]:
        """Shards stacked along dim 0 in rank order: (t, …) → (T, …).

        `out`: a contiguous (T, …) tensor to fill, instead of a new one.
        """
        ...

    def reduce_scatter(self, x: Tensor, wire: torch.dtype | None = None) -> Handle[Tensor]:
        """The sum over ranks, of which each keeps its rows: (T, …) → (t, …), in x's dtype.

        Added in rank order, in fp32 or wider. T is a multiple of the group's size.
        """
        ...

    def all_reduce(self, x: Tensor) -> Handle[Tensor]:
        """The sum over ranks, the same bits on each, as a new tensor of x's shape and dtype.

        Added in rank order, in fp32 or wider. Any shape will do.
        """
        ...

    def all_gather_rows(self, tensors: Sequence[Tensor]) -> Handle[None]:
        """Fill the rows of the other ranks, in place; one coalesced operation.

        Each tensor is (R, …) and contiguous, R a multiple of the group's size; rank r has filled
        rows r·R/size to (r+1)·R/size.
        """
        ...

    def reduce_scatter_rows(
        self, tensors: Sequence[Tensor], wire: torch.dtype | None = None
    ) -> Handle[None]:
        """This rank's rows become the sum over ranks, in place; one coalesced operation.

        Rows as in `all_gather_rows`; those of other ranks are left unspecified. Added in rank
        order, in fp32 or wider; the result is in the tensor's dtype.
        """
        ...

    def send(self, x: Tensor, peer: int, label: str = "") -> Handle[None]:
        """Give x to rank `peer` of the group; done when the peer is taking it.

        `label` says what the message is, alike on both sides: for errors, the strict mode and the
        timeline. It does not travel.
        """
        ...

    def receive(self, out: Tensor, peer: int, label: str = "") -> Handle[Tensor]:
        """Fill the contiguous `out` with what rank `peer` of the group sends, and return it."""
        ...

    def close(self) -> None:
        """End the group. Operations still under way are given up: their handles raise LostError."""
        ...


class SingleGroup:
    """The group of one process: every collective has its result at once and moves no bytes.

    Its handles have the covers of larger groups, so that a pass runs in the order of larger groups.
    """

    rank = 0
    size = 1

    def __init__(self, name: str = "single") -> None:
        self.name = name

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Handle[Tensor]:
        """x itself, or `out` with x in it."""
        return Done(x if out is None else out.copy_(x), COVER)

    def reduce_scatter(self, x: Tensor, wire: torch.dtype | None = None) -> Handle[Tensor]:
        """x itself: nothing travels, so nothing is rounded to `wire`."""
        return Done(x, COVER)

    def all_reduce(self, x: Tensor) -> Handle[Tensor]:
        """A copy of x: the result of an all-reduce is the caller's to change."""
        return Done(x.clone(), COVER_ALL_REDUCE)

    def all_gather_rows(self, tensors: Sequence[Tensor]) -> Handle[None]:
        return Done(None, COVER)

    def reduce_scatter_rows(
        self, tensors: Sequence[Tensor], wire: torch.dtype | None = None
    ) -> Handle[None]:
        return Done(None, COVER)

    def send(self, x: Tensor, peer: int, label: str = "") -> Handle[None]:
        raise ValueError(f"group {self.name!r} has one rank: there is no rank {peer} to send to")

    def receive(self, out: Tensor, peer: int, label: str = "") -> Handle[Tensor]:
        raise ValueError(f"group {self.name!r} has one rank: nothing comes from a rank {peer}")

    def close(self) -> None:
        pass


class Blocking:
    """A group without overlap: every operation of `group` is waited for before it returns.

    The handles' covers are 0, so that no deferred weight gradient runs before a wait either.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self.name, self.rank, self.size = group.name, group.rank, group.size

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Handle[Tensor]:
        return Done(self._group.all_gather(x, out).wait())

    def reduce_scatter(self, x: Tensor, wire: torch.dtype | None = None) -> Handle[Tensor]:
        return Done(self._group.reduce_scatter(x, wire).wait())

    def all_reduce(self, x: Tensor) -> Handle[Tensor]:
        return Done(self._group.all_reduce(x).wait())

    def all_gather_rows(self, tensors: Sequence[Tensor]) -> Handle[None]:
        return Done(self._group.all_gather_rows(tensors).wait())

    def reduce_scatter_rows(
        self, tensors: Sequence[Tensor], wire: torch.dtype | None = None
    ) -> Handle[None]:
        return Done(self._group.reduce_scatter_rows(tensors, wire).wait())

    def send(self, x: Tensor, peer: int, label: str = "") -> Handle[None]:
        return Done(self._group.send(x, peer, label).wait())

    def receive(self, out: Tensor, peer: int, label: str = "") -> Handle[Tensor]:
        return Done(self._group.receive(out, peer, label).wait())

    def close(self) -> None:
        self._group.close()
