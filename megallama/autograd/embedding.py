"""Token embedding: the forward looks rows up, the backward adds rows back."""

from __future__ import annotations

from torch import Tensor


def embedding_forward(tokens_T: Tensor, w_VD: Tensor) -> Tensor:
    """(T,), (V, D) → (T, D)."""
    return w_VD[tokens_T]


def embedding_backward(dx_TD: Tensor, tokens_T: Tensor, dw_VD: Tensor) -> None:
    """Add each token's gradient into its row of `dw_VD`."""
    dw_VD.index_add_(0, tokens_T, dx_TD.to(dw_VD.dtype))
