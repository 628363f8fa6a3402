"""What the decoder layer's passes are given: small objects that know who owns what.

`autograd` knows the mathematics and the order of things; `parallel` implements these protocols and
knows shards, groups and buffers. With one process every collective is done before it starts.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from megallama.dist.handle import Handle


class Linear(Protocol):
    """A linear layer whose weight is a shard: y = x·wᵀ.

    Column-parallel: `gather` makes the input whole, `scatter` sums and divides the input's
    gradient. Row-parallel: `scatter` sums and divides the output, `gather` makes the output's
    gradient whole.
    """

    def gather(self, x_tD: Tensor) -> Handle[Tensor]:
        """Start making sequence shards (t, D) whole (T, D)."""
        ...

    def scatter(self, y_TD: Tensor) -> Handle[Tensor]:
        """Start summing partial results (T, D) over ranks, each keeping its tokens (t, D)."""
        ...

    def weight(self) -> Handle[Tensor]:
        """Ask for the weight in the compute dtype."""
        ...

    def forward(self, x: Tensor, w: Tensor) -> Tensor: ...

    def dgrad(self, dy: Tensor, w: Tensor) -> Tensor: ...

    def wgrad(self, dy: Tensor, x: Tensor) -> None:
        """Add the weight's gradient into its buffer."""
        ...


class Norm(Protocol):
    """A normalisation of sequence shards (t, D)."""

    def weight(self) -> Handle[Tensor]: ...

    def forward(self, x_tD: Tensor, w_D: Tensor) -> Tensor: ...

    def backward(self, dn_tD: Tensor, x_tD: Tensor, w_D: Tensor) -> Tensor:
        """Return dx and add the weight's gradient into its buffer."""
        ...
