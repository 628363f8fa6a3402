"""Token embedding: the forward looks rows up, the backward adds rows back.

The table may be a shard of the vocabulary with some rows of padding: tokens are counted from its
first row, and those outside 0 … rows are other ranks'.
"""

from __future__ import annotations

from torch import Tensor


def embedding_forward(tokens_T: Tensor, w_vD: Tensor, rows: int) -> Tensor:
    """(T,), (v, D) → (T, D), zero for tokens that are not here."""
    mine_T = (tokens_T >= 0) & (tokens_T < rows)
    return w_vD[tokens_T.where(mine_T, 0)].masked_fill_(~mine_T[:, None], 0)


def embedding_backward(dx_TD: Tensor, tokens_T: Tensor, dw_vD: Tensor, rows: int) -> None:
    """Add each token's gradient into its row of `dw_vD`, if it is here."""
    mine_T = (tokens_T >= 0) & (tokens_T < rows)
    # No boolean indexing: its result's length would have to come back from the device.
    masked_TD = dx_TD.to(dw_vD.dtype, copy=True).masked_fill_(~mine_T[:, None], 0)
    # Zeros go to every row in turn: all to one would be added one after the other.
    dw_vD.index_add_(0, tokens_T.remainder(len(dw_vD)), masked_TD)
