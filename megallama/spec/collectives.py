"""Counts of collectives, one by one: calls, and the bytes that a rank sends.

Bytes are those of `megallama.dist.traffic`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class Count(NamedTuple):
    """How often an operation is issued, and the bytes that one rank sends for it."""

    calls: int
    bytes: int


@dataclass(frozen=True)
class Traffic:
    """Counts by (group name, operation). Groups of one rank do not occur."""

    counts: Mapping[tuple[str, str], Count] = field(default_factory=dict)

    def __add__(self, other: Traffic) -> Traffic:
        total = dict(self.counts)
        for key, count in other.counts.items():
            held = total.get(key, Count(0, 0))
            total[key] = Count(held.calls + count.calls, held.bytes + count.bytes)
        return Traffic(total)

    def __rmul__(self, times: int) -> Traffic:
        """So many times the same; nothing at all is `NOTHING`, not keys with zeros."""
        if not times:
            return NOTHING
        return Traffic({k: Count(times * c.calls, times * c.bytes) for k, c in self.counts.items()})


NOTHING = Traffic()


# Bytes that one of `n` ranks sends. Whoever counts, prices or notes a collective takes them here.


def sharded_bytes(n: int, shard: int) -> int:
    """An all-gather's, of the bytes of a rank's shard; a reduce-scatter's, of those of the shard
    that a rank keeps, as they travel."""
    return (n - 1) * shard


def all_reduce_bytes(n: int, elements: int, itemsize: int) -> int:
    """2·(n-1)·⌈elements/n⌉·itemsize: a reduce-scatter, then an all-gather."""
    return 2 * sharded_bytes(n, -(-elements // n) * itemsize)


# One collective each.


def all_gather(group: str, n: int, shard: int, rows: bool = False) -> Traffic:
    """`rows` is the coalesced operation of a bucket."""
    return _one(group, "all_gather_rows" if rows else "all_gather", n, sharded_bytes(n, shard))


def reduce_scatter(group: str, n: int, shard: int, rows: bool = False) -> Traffic:
    operation = "reduce_scatter_rows" if rows else "reduce_scatter"
    return _one(group, operation, n, sharded_bytes(n, shard))


def all_reduce(group: str, n: int, elements: int, itemsize: int) -> Traffic:
    return _one(group, "all_reduce", n, all_reduce_bytes(n, elements, itemsize))


def _one(group: str, operation: str, n: int, sent: int) -> Traffic:
    return Traffic({(group, operation): Count(1, sent)}) if n > 1 else NOTHING


@dataclass(frozen=True)
class Stream:
    """The residual stream of a micro-batch, (T, D), as the `ranks` tensor ranks share it.

    `itemsize` is the compute dtype's; `chunks` those of the forward.
    """

    tokens: int
    width: int
    itemsize: int
    ranks: int
    sequence_parallel: bool = True
    chunks: int = 1

    def gather(self) -> Traffic:
        """From shards to the whole, chunk by chunk: `chunks` all-gathers, (n-1)·T·D·e/n in all.

        Nothing without sequence parallelism: every rank has all tokens already.
        """
        if not self.sequence_parallel:
            return NOTHING
        return self.chunks * all_gather("tensor", self.ranks, self._chunk() // self.ranks)

    def scatter(self) -> Traffic:
        """From the ranks' parts to the sum, chunk by chunk, (n-1)·T·D·e/n in all.

        Without sequence parallelism the sum is whole on every rank: all-reduces of twice the bytes.
        """
        if not self.sequence_parallel:
            return self.chunks * self._all_reduce(self.chunks)
        return self.chunks * reduce_scatter("tensor", self.ranks, self._chunk() // self.ranks)

    def scatter_gradient(self) -> Traffic:
        """As `scatter`, but an all-reduce is not cut in chunks.

        The backward takes all tokens at once. Under sequence parallelism its collectives still go
        by the forward's chunks, because a rank's shard is one run of tokens of each.
        """
        return self.scatter() if self.sequence_parallel else self._all_reduce(chunks=1)

    def shard(self) -> int:
        """Bytes of this rank's tokens: what goes from one pipeline rank to the next."""
        held = self.tokens // self.ranks if self.sequence_parallel else self.tokens
        return held * self.width * self.itemsize

    def _chunk(self) -> int:
        """Bytes of a chunk."""
        return self.tokens // self.chunks * self.width * self.itemsize

    def _all_reduce(self, chunks: int) -> Traffic:
        elements = self.tokens // chunks * self.width
        return all_reduce("tensor", self.ranks, elements, self.itemsize)
