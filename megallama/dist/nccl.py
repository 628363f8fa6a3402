"""A group over NCCL: collectives queued on the process group's own stream.

Multi-GPU NCCL has never been run. The calls were tested on a gloo backend, which does not coalesce,
so the coalesced calls of the rows operations have run nowhere. A handle's `wait` makes only the
stream wait: a lost peer shows where values come back to the host, and then as the watchdog's abort.
Nothing is recorded for a timeline (that takes CUDA events), and labels are used nowhere.

Where this differs from `Group`: NCCL adds in an order of its own and in the tensor's dtype, so
reductions are exact only where `wire` narrows the tensor's dtype; then the parts travel by
all-to-all and are added here, in rank order and in fp32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from megallama.dist import compat
from megallama.dist.group import COVER, COVER_ALL_REDUCE
from megallama.dist.handle import Handle, Joined
from megallama.dist.parcels import Parcel, by_rank
from megallama.dist.shapes import check_filled, check_peer, check_rows, gathered, scattered
from megallama.dist.sums import room_bytes, sum_in_order
from megallama.dist.traffic import (
    Traffic,
    all_gather_bytes,
    all_gather_rows_bytes,
    all_reduce_bytes,
    reduce_scatter_bytes,
    reduce_scatter_rows_bytes,
)
from megallama.errors import LostError

T = TypeVar("T")


class Issued(Generic[T]):
    """The handle of operations that NCCL runs.

    `wait` makes the current stream wait, then `finish` makes the value, on that stream. `keep`: the
    operation's tensors, which live as long as the handle.
    """

    def __init__(
        self,
        works: Sequence[compat.Work],
        cover: int,
        finish: Callable[[], T],
        keep: Sequence[Tensor],
    ) -> None:
        self.cover = cover
        self._works, self._finish, self._keep = works, finish, keep

    def wait(self) -> T:
        try:
            for work in self._works:
                work.wait()
        except compat.AcceleratorError:  # this rank's own device: its machine is to be named
            raise
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            words = f"a NCCL operation failed ({reason}); try again"
            raise LostError(words, follows=True) from None
        return self._finish()


class NcclGroup:
    """See `Group`, and the module for what differs. `backend`: a ProcessGroupNCCL."""

    def __init__(self, backend: Any, name: str, rank: int, size: int, traffic: Traffic) -> None:
        self.name, self.rank, self.size = name, rank, size
        self._backend, self._traffic = backend, traffic

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Handle[Tensor]:
        filled, x = gathered(x, self.size, out), x.contiguous()
        self._count("all_gather", all_gather_bytes(x, self.size))
        work = compat.all_gather_single(self._backend, filled, x)
        return Issued([work], COVER, lambda: filled, [x])

    def reduce_scatter(self, x: Tensor, wire: torch.dtype | None = None) -> Handle[Tensor]:
        shard, dtype = scattered(x, self.size), wire or x.dtype
        self._count("reduce_scatter", reduce_scatter_bytes(x, self.size, wire))
        if dtype != x.dtype:
            sent = by_rank(x.to(dtype).contiguous(), self.size)
            return self._sum_here(sent, shard.view(-1), lambda: shard)
        x = x.contiguous()
        work = compat.reduce_scatter_single(self._backend, shard, x)
        return Issued([work], COVER, lambda: shard, [x])

    def all_reduce(self, x: Tensor) -> Handle[Tensor]:
        total = x.clone(memory_format=torch.contiguous_format)
        self._count("all_reduce", all_reduce_bytes(x, self.size))
        work = compat.all_reduce(self._backend, total)
        return Issued([work], COVER_ALL_REDUCE, lambda: total, [total])

    def all_gather_rows(self, tensors: Sequence[Tensor]) -> Handle[None]:
        check_rows(tensors, self.size)
        self._count("all_gather_rows", all_gather_rows_bytes(tensors, self.size))
        views = [by_rank(x, self.size) for x in tensors]
        return self._coalesced(compat.all_gather_single, [(v, self._own(v)) for v in views])

    def reduce_scatter_rows(
        self, tensors: Sequence[Tensor], wire: torch.dtype | None = None
    ) -> Handle[None]:
        check_rows(tensors, self.size)
        self._count("reduce_scatter_rows", reduce_scatter_rows_bytes(tensors, self.size, wire))
        views = [by_rank(x, self.size) for x in tensors]
        if wire is None or all(x.dtype == wire for x in tensors):
            return self._coalesced(compat.reduce_scatter_single, [(self._own(v), v) for v in views])
        by_dtype = {x.dtype: [v for v in views if v.dtype == x.dtype] for x in tensors}
        loads = [Parcel(alike, wire) for alike in by_dtype.values()]
        return Joined([self._sum_parcel(load) for load in loads], None)

    def send(self, x: Tensor, peer: int, label: str = "") -> Handle[None]:
        check_peer(self.name, self.rank, self.size, peer)
        self._traffic.add(self.name, "send", x.nbytes)
        x = x.contiguous()
        return Issued([self._backend.send([x], peer, 0)], 0, lambda: None, [x])

    def receive(self, out: Tensor, peer: int, label: str = "") -> Handle[Tensor]:
        check_peer(self.name, self.rank, self.size, peer)
        check_filled(out)
        self._traffic.add(self.name, "receive", 0)
        return Issued([self._backend.recv([out], peer, 0)], 0, lambda: out, [out])

    def close(self) -> None:
        """Give up what is under way; `shutdown` would wait for peers that may be gone."""
        self._backend.abort()

    def _count(self, operation: str, sent: int) -> None:
        self._traffic.add(self.name, operation, sent)

    def _own(self, view: Tensor) -> Tensor:
        """This rank's row of (size, m), as (1, m): a view."""
        return view[self.rank : self.rank + 1]

    def _coalesced(
        self,
        operation: Callable[[Any, Tensor, Tensor], compat.Work],
        pairs: Sequence[tuple[Tensor, Tensor]],
    ) -> Handle[None]:
        """One NCCL group call of `operation` on (output, input) pairs that share memory.

        NCCL works in place where a rank's rows are the part of the whole tensor at its rank.
        """
        with compat.coalescing(self._backend) as works:
            for out, x in pairs:
                works.append(operation(self._backend, out, x))
        return Issued(works, COVER, lambda: None, [tensor for pair in pairs for tensor in pair])

    def _sum_parcel(self, load: Parcel) -> Handle[None]:
        """This rank's row of every tensor of `load` becomes the sum over ranks."""
        result = load.result(self.rank)
        return self._sum_here(load.packed(), result, lambda: load.unpack(result, self.rank))

    def _sum_here(self, sent: Tensor, result: Tensor, finish: Callable[[], T]) -> Handle[T]:
        """`sent` (size, m): row p goes to rank p. `result` (m,) becomes the sum in rank order."""
        received = torch.empty_like(sent)
        work = compat.all_to_all_single(self._backend, received, sent)

        def add() -> T:
            needed = room_bytes(received.dtype, result, self.size)
            room = torch.empty(needed, dtype=torch.uint8, device=result.device)
            sum_in_order(received.unbind(), self.size, result, room)
            return finish()

        return Issued([work], COVER, add, [sent, received])
