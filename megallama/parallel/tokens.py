"""How the tensor ranks share a micro-batch's tokens (sequence parallelism, arXiv 2205.05198).

With sequence parallelism a rank keeps one run of tokens of each chunk: gathering a chunk is an
all-gather, and what a row-parallel linear returns is summed by a reduce-scatter. Without it every
rank keeps all tokens: gathering is nothing, and the sum is an all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megallama.dist.group import Group
from megallama.dist.handle import Done, Handle, Joined


@dataclass(frozen=True)
class _Stacked:
    """A handle for the chunks' results, stacked."""

    handles: Sequence[Handle[Tensor]]

    @property
    def cover(self) -> int:
        return max(handle.cover for handle in self.handles)

    def wait(self) -> Tensor:
        return torch.cat([handle.wait() for handle in self.handles])


class TokenShards:
    """The tokens of a tensor group's ranks, in `chunks` equal chunks. See `autograd.protocols`."""

    def __init__(self, group: Group, sequence_parallel: bool = True, chunks: int = 1) -> None:
        self.group, self.sequence_parallel, self.chunks = group, sequence_parallel, chunks

    def whole_rows(self, t: int) -> int:
        return t * self.group.size if self.sequence_parallel else t

    def shard_rows(self, rows: int) -> int:
        """t, of T tokens."""
        return rows // self.group.size if self.sequence_parallel else rows

    def split(self, x: Tensor) -> Sequence[Tensor]:
        return x.chunk(self.chunks)

    def gather_chunk(self, x_cD: Tensor) -> Handle[Tensor]:
        return self.group.all_gather(x_cD) if self.sequence_parallel else Done(x_cD)

    def scatter_chunk(self, y_CD: Tensor) -> Handle[Tensor]:
        if self.sequence_parallel:
            return self.group.reduce_scatter(y_CD)
        return self.group.all_reduce(y_CD)

    def gather(self, x_tD: Tensor) -> Handle[Tensor]:
        if self.chunks == 1 or not self.sequence_parallel:
            return self.gather_chunk(x_tD)
        x_TD = x_tD.new_empty(self.whole_rows(len(x_tD)), *x_tD.shape[1:])
        pieces = zip(self.split(x_tD), self.split(x_TD), strict=True)
        return Joined([self.group.all_gather(shard, out=whole) for shard, whole in pieces], x_TD)

    def scatter(self, y_TD: Tensor) -> Handle[Tensor]:
        if self.chunks == 1 or not self.sequence_parallel:
            return self.scatter_chunk(y_TD)
        return _Stacked([self.group.reduce_scatter(y_CD) for y_CD in self.split(y_TD)])
