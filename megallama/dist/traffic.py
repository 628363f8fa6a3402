"""What this rank sent: calls and bytes per group and operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megallama.spec import collectives


@dataclass
class Count:
    """How often an operation was issued, and the bytes that this rank sent for it."""

    calls: int = 0
    bytes: int = 0


@dataclass
class Traffic:
    """Counters by (group name, operation), counted when an operation is issued.

    Bytes are those of the functions below; a send's are the tensor's, whatever its label, and a
    receive's 0. Groups of one rank are not counted.

    An all-reduce counts as its two steps on every backend and at every size. On gloo one of at most
    1 KiB takes a single step, in which a rank sends (n-1) times the tensor.
    """

    counts: dict[tuple[str, str], Count] = field(default_factory=dict)

    def add(self, group: str, operation: str, sent: int) -> None:
        """Count one call of `operation` in `group` for which this rank sends `sent` bytes."""
        count = self.counts.setdefault((group, operation), Count())
        count.calls += 1
        count.bytes += sent


# Bytes that one of `size` ranks sends for a collective. `wire`: the dtype that travels, if another.


def all_gather_bytes(x: Tensor, size: int) -> int:
    return collectives.sharded_bytes(size, x.nbytes)


def reduce_scatter_bytes(x: Tensor, size: int, wire: torch.dtype | None = None) -> int:
    return collectives.sharded_bytes(size, x.numel() // size * (wire or x.dtype).itemsize)


def all_reduce_bytes(x: Tensor, size: int) -> int:
    return collectives.all_reduce_bytes(size, x.numel(), x.itemsize)


def all_gather_rows_bytes(tensors: Sequence[Tensor], size: int) -> int:
    return sum(collectives.sharded_bytes(size, x.nbytes // size) for x in tensors)


def reduce_scatter_rows_bytes(
    tensors: Sequence[Tensor], size: int, wire: torch.dtype | None = None
) -> int:
    return sum(reduce_scatter_bytes(x, size, wire) for x in tensors)
