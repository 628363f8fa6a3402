"""A group over gloo: collectives out of point-to-point messages, run in order by one thread.

The reductions are ours because gloo's reduce-scatter moves the bytes of an all-reduce and adds
bf16 in bf16. The all-gather is ours because gloo's, as torch calls it, copies its whole result once
more. Every rank exchanges with every other one directly: the bytes of a ring, and the first rank
that is lost is noticed by all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from megallama.dist.check import Check, describe
from megallama.dist.group import COVER, COVER_ALL_REDUCE
from megallama.dist.handle import Handle
from megallama.dist.link import COLLECTIVE, POINT, Link, Posted
from megallama.dist.parcels import by_rank, parcels
from megallama.dist.recorder import Recorder
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
from megallama.dist.watch import Vigil
from megallama.dist.worker import Worker

T = TypeVar("T")

#: Bytes up to which an all-reduce takes one step rather than two: there the wait is the cost.
SMALL = 1024


class Scratch:
    """What a group receives and adds up in, used again by each operation: they run one at a time.

    Fresh memory would cost a page fault every 4 KiB, in a group's thread every time: 3.5 ms for the
    2 MiB in which 1 MiB of bf16 is added up. It grows to what the largest operation needs.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def buffers(self, sizes: Sequence[tuple[int, torch.dtype]]) -> list[Tensor]:
        """A tensor for each (elements, dtype); they replace those given before."""
        ends, offset = [], 0
        for elements, dtype in sizes:
            ends.append((offset, offset + elements * dtype.itemsize))
            offset += -(-elements * dtype.itemsize // 64) * 64
        if self._memory.numel() < offset:
            self._memory = torch.empty(offset, dtype=torch.uint8)
        return [
            self._memory[begin:end].view(dtype)
            for (begin, end), (_, dtype) in zip(ends, sizes, strict=True)
        ]


class GlooGroup:
    """See `Group`. Sums are exactly in rank order, in fp32 or wider; a group has two ranks or more.

    The handles of `send` and `receive` have cover 0: who waits for them is the pipeline, which
    orders weight gradients itself.
    """

    def __init__(
        self,
        link: Link,
        vigil: Vigil,
        traffic: Traffic,
        recorder: Recorder,
        *,
        strict: bool = False,
    ) -> None:
        self.name, self.rank, self.size = link.name, link.rank, link.size
        self._link, self._traffic, self._scratch = link, traffic, Scratch()
        self._recorder = recorder
        self._check = Check(link) if strict else None
        self._worker = Worker(f"gloo {link.name}", vigil, link.break_off)

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Handle[Tensor]:
        filled = gathered(x, self.size, out)
        self._count("all_gather", all_gather_bytes(x, self.size))

        def run() -> Tensor:
            rows = by_rank(filled, self.size).unbind()
            rows[self.rank].copy_(x.reshape(-1))
            self._spread("all_gather", [rows])
            return filled

        return self._submit(run, COVER, "all_gather", [x])

    def reduce_scatter(self, x: Tensor, wire: torch.dtype | None = None) -> Handle[Tensor]:
        shard, dtype = scattered(x, self.size), wire or x.dtype
        self._count("reduce_scatter", reduce_scatter_bytes(x, self.size, wire))

        def run() -> Tensor:
            shares = by_rank(x.to(dtype).contiguous(), self.size).unbind()
            self._reduce("reduce_scatter", [shares], [shard.view(-1)])
            return shard

        return self._submit(run, COVER, "reduce_scatter", [x], wire)

    def all_reduce(self, x: Tensor) -> Handle[Tensor]:
        share = -(-x.numel() // self.size)
        total = torch.empty(x.shape, dtype=x.dtype)
        self._count("all_reduce", all_reduce_bytes(x, self.size))

        def run_small() -> Tensor:
            # In one step: each rank adds the whole, with the same additions as in two.
            self._reduce("all_reduce", [[x.reshape(-1)] * self.size], [total.view(-1)])
            return total

        def run() -> Tensor:
            cuts = [slice(rank * share, (rank + 1) * share) for rank in range(self.size)]
            mine, whole = x.reshape(-1), total.view(-1)
            parts = [whole[cut] for cut in cuts]  # the last ones may be short or empty
            self._reduce("all_reduce", [[mine[cut] for cut in cuts]], [parts[self.rank]])
            self._spread("all_reduce", [parts])
            return total

        small = x.nbytes <= SMALL
        return self._submit(run_small if small else run, COVER_ALL_REDUCE, "all_reduce", [x])

    def all_gather_rows(self, tensors: Sequence[Tensor]) -> Handle[None]:
        check_rows(tensors, self.size)
        self._count("all_gather_rows", all_gather_rows_bytes(tensors, self.size))

        def run() -> None:
            loads = parcels(tensors, self.size)
            rows = [load.packed().unbind() for load in loads]
            self._spread("all_gather_rows", rows)
            for load, filled in zip(loads, rows, strict=True):
                for peer in self._link.peers():
                    load.unpack(filled[peer], peer)

        return self._submit(run, COVER, "all_gather_rows", tensors)

    def reduce_scatter_rows(
        self, tensors: Sequence[Tensor], wire: torch.dtype | None = None
    ) -> Handle[None]:
        check_rows(tensors, self.size)
        self._count("reduce_scatter_rows", reduce_scatter_rows_bytes(tensors, self.size, wire))

        def run() -> None:
            loads = parcels(tensors, self.size, wire)
            results = [load.result(self.rank) for load in loads]
            shares = [load.packed().unbind() for load in loads]
            self._reduce("reduce_scatter_rows", shares, results)
            for load, row in zip(loads, results, strict=True):
                load.unpack(row, self.rank)

        return self._submit(run, COVER, "reduce_scatter_rows", tensors, wire)

    def send(self, x: Tensor, peer: int, label: str = "") -> Handle[None]:
        check_peer(self.name, self.rank, self.size, peer)
        self._traffic.add(self.name, "send", x.nbytes)

        def run() -> None:
            owed = f"to take {label or 'a message'}"
            self._link.exchange(owed, {peer: [x.contiguous()]}, {}, POINT)

        return self._submit_point(run, "send", x, peer, label)

    def receive(self, out: Tensor, peer: int, label: str = "") -> Handle[Tensor]:
        check_peer(self.name, self.rank, self.size, peer)
        check_filled(out)
        self._traffic.add(self.name, "receive", 0)

        def run() -> Tensor:
            owed = f"to send {label or 'a message'}"
            self._link.exchange(owed, {}, {peer: [out]}, POINT)
            return out

        return self._submit_point(run, "receive", out, peer, label)

    def close(self) -> None:
        self._link.closed = True
        self._worker.close()

    def _count(self, operation: str, sent: int) -> None:
        self._traffic.add(self.name, operation, sent)

    def _submit(
        self,
        run: Callable[[], T],
        cover: int,
        operation: str,
        tensors: Sequence[Tensor],
        wire: torch.dtype | None = None,
    ) -> Handle[T]:
        """Queue a collective, after the strict mode's comparison of what all ranks ask for."""
        check, recorder = self._check, self._recorder

        def checked() -> T:
            if check is not None:
                check.collective(describe(operation, *tensors, wire=wire))
            return recorder.communication(self.name, operation, run)

        return self._worker.submit(checked, cover)

    def _submit_point(
        self, run: Callable[[], T], operation: str, tensor: Tensor, peer: int, label: str
    ) -> Handle[T]:
        """Queue a send or a receive, after the strict mode's comparison with the other side."""
        check, recorder = self._check, self._recorder

        def checked() -> T:
            if check is not None:
                check.point(peer, operation == "send", tensor, label)
            return recorder.communication(self.name, label or operation, run)

        return self._worker.submit(checked, 0)

    def _spread(self, operation: str, many: Sequence[Sequence[Tensor]]) -> None:
        """Each of `many` has a part a rank: send this rank's to all, fill the others'."""
        peers = self._link.peers()
        mine = [parts[self.rank] for parts in many]
        incoming = {peer: [parts[peer] for parts in many] for peer in peers}
        self._link.exchange(
            f"to take part in {operation}", dict.fromkeys(peers, mine), incoming, COLLECTIVE
        )

    def _reduce(
        self, operation: str, many: Sequence[Sequence[Tensor]], results: Sequence[Tensor]
    ) -> None:
        """Each of `many` has a part for each rank: results become the sums of this rank's parts."""
        peers = self._link.peers()
        mine = [parts[self.rank] for parts in many]
        sizes = [(part.numel(), part.dtype) for part in mine]
        needed = max(
            room_bytes(part.dtype, result, self.size)
            for part, result in zip(mine, results, strict=True)
        )
        *buffers, room = self._scratch.buffers([*sizes * len(peers), (needed, torch.uint8)])
        incoming = {
            peer: buffers[place * len(many) : (place + 1) * len(many)]
            for place, peer in enumerate(peers)
        }
        outgoing = {peer: [parts[peer] for parts in many] for peer in peers}
        posted = self._link.post(f"to take part in {operation}", outgoing, incoming, COLLECTIVE)
        for index, result in enumerate(results):
            parts = self._in_order(posted, mine[index], {p: incoming[p][index] for p in peers})
            sum_in_order(parts, self.size, result, room)
        posted.finish()

    def _in_order(
        self, posted: Posted, mine: Tensor, others: dict[int, Tensor]
    ) -> Iterator[Tensor]:
        """The parts by rank, each once it has arrived."""
        for rank in range(self.size):
            if rank != self.rank:
                posted.arrived(rank)
            yield mine if rank == self.rank else others[rank]
