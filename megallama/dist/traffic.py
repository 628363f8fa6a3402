"""What this rank sent: calls and bytes per group and operation."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Count:
    """How often an operation was issued, and the bytes that this rank sent for it."""

    calls: int = 0
    bytes: int = 0


@dataclass
class Traffic:
    """Counters by (group name, operation), counted when an operation is issued.

    Bytes, for n ranks: all_gather (n-1) · the shard's; reduce_scatter (n-1)/n · the input's;
    all_reduce 2·(n-1)·ceil(elements/n)·itemsize; all_gather_rows and reduce_scatter_rows
    (n-1)/n · the tensors'; send the tensor's, whatever its label; receive 0. Reductions count the
    itemsize that travels. Groups of one rank are not counted.

    An all-reduce counts as its two steps on every backend and at every size. On gloo one of at most
    1 KiB takes a single step, in which a rank sends (n-1) times the tensor.
    """

    counts: dict[tuple[str, str], Count] = field(default_factory=dict)

    def add(self, group: str, operation: str, sent: int) -> None:
        """Count one call of `operation` in `group` for which this rank sends `sent` bytes."""
        count = self.counts.setdefault((group, operation), Count())
        count.calls += 1
        count.bytes += sent
