"""What the decoder layer's passes are given: small objects that know who owns what.

`autograd` knows the mathematics and the order of things; `parallel` implements these protocols and
knows shards, groups and buffers. With one process every collective is done before it starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from megallama.dist.handle import Handle


class Tokens(Protocol):
    """How the tensor ranks share a micro-batch's tokens, and the collectives at the borders.

    Between the linears each rank has t of the T tokens (all of them without sequence parallelism).
    The t are made of `chunks` equal chunks that can travel one by one.
    """

    chunks: int

    def whole_rows(self, t: int) -> int:
        """T, of a shard with t rows."""
        ...

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """The chunks of a tensor with t or T rows, as views."""
        ...

    def gather_chunk(self, x_cD: Tensor) -> Handle[Tensor]:
        """Start making the ranks' shards of a chunk whole."""
        ...

    def scatter_chunk(self, y_CD: Tensor) -> Handle[Tensor]:
        """Start summing partial results of a whole chunk over ranks; each keeps its tokens."""
        ...

    def gather(self, x_tD: Tensor) -> Handle[Tensor]:
        """`gather_chunk` of all chunks: (t, D) → (T, D)."""
        ...

    def scatter(self, y_TD: Tensor) -> Handle[Tensor]:
        """`scatter_chunk` of all chunks: (T, D) → (t, D)."""
        ...


class Linear(Protocol):
    """A linear layer whose weight is a shard: y = x·wᵀ.

    Column-parallel: its input is gathered before, its input's gradient scattered after.
    Row-parallel: its output is scattered after, its output's gradient gathered before.
    """

    def weight(self) -> Handle[Tensor]:
        """Ask for the weight in the compute dtype."""
        ...

    def forward(self, x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
        """x·wᵀ, into `out` where given."""
        ...

    def dgrad(self, dy: Tensor, w: Tensor) -> Tensor: ...

    def wgrad(self, dy: Tensor, x: Tensor, part: int = 0, parts: int = 1) -> None:
        """Add the weight's gradient into its buffer, or one of `parts` equal parts of its rows.

        Parts come in order; with the last one the gradient has landed.
        """
        ...


class Norm(Protocol):
    """A normalisation of sequence shards (t, D)."""

    def weight(self) -> Handle[Tensor]: ...

    def forward(self, x_tD: Tensor, w_D: Tensor) -> Tensor: ...

    def add_forward(self, x_tD: Tensor, y_tD: Tensor, w_D: Tensor, out: Tensor) -> Tensor:
        """Write x + y into `out` and return its norm."""
        ...

    def backward(
        self, dn_tD: Tensor, x_tD: Tensor, w_D: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        """Return dx, in dn's memory, and add the weight's gradient into its buffer.

        dx includes `residual`, the gradient of x's other use.
        """
        ...
