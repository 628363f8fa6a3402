"""A linear layer's three GEMMs: y = x·wᵀ, dx = dy·w, dw += dyᵀ·x.

The backward is two functions because the two are wanted at different times: dgrad is on the path to
the previous layer, wgrad is not and fills the time that communication takes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_forward(x_TI: Tensor, w_OI: Tensor, out: Tensor | None = None) -> Tensor:
    """(T, I) · (O, I) → (T, O), into `out` where given."""
    return torch.mm(x_TI, w_OI.T, out=out)


def linear_dgrad(dy_TO: Tensor, w_OI: Tensor, out: Tensor | None = None) -> Tensor:
    """(T, O) · (O, I) → (T, I), into `out` where given."""
    return torch.mm(dy_TO, w_OI, out=out)


def linear_wgrad(dy_TO: Tensor, x_TI: Tensor, dw_OI: Tensor) -> None:
    """Add (O, T) · (T, I) into `dw_OI`, which may be wider (fp32 under bf16).

    On a CPU PyTorch has no bf16 GEMM with an fp32 result: each call's product is rounded to bf16
    (relative error 2e-3) before it is added in fp32.
    """
    if dw_OI.dtype == dy_TO.dtype:
        dw_OI.addmm_(dy_TO.T, x_TI)
    elif dy_TO.is_cuda:
        # cuBLAS accumulates bf16 products into an fp32 matrix: nothing is rounded on the way.
        torch.addmm(dw_OI, dy_TO.T, x_TI, out_dtype=dw_OI.dtype, out=dw_OI)
    else:
        dw_OI.add_(dy_TO.T @ x_TI)
