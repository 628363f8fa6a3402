"""RMSNorm (arXiv 1910.07467): n = x / √(mean(x²) + ε) · w, over the last dimension.

The statistics are computed in fp32 (fp64 under fp64) and recomputed in the backward: they cost one
read of x, which the backward needs anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm_forward(x_TD: Tensor, w_D: Tensor, eps: float) -> Tensor:
    """(T, D), (D,) → (T, D)."""
    wide = _widened(x_TD)
    return (wide * _inverse_rms(wide, eps)).mul_(w_D).to(x_TD.dtype)


def rms_norm_backward(dn_TD: Tensor, x_TD: Tensor, w_D: Tensor, dw_D: Tensor, eps: float) -> Tensor:
    """Return dx (T, D) and add dw into `dw_D`.

    With r = 1/√(mean(x²) + ε) and y = r·x: dw = Σ_T dn·y, dx = r·(dn·w − y·mean(dn·w·y)).
    """
    wide, dn = _widened(x_TD), _widened(dn_TD)
    r_T1 = _inverse_rms(wide, eps)
    y_TD = wide * r_T1
    dw_D.add_((dn * y_TD).sum(0))
    dy_TD = dn * w_D
    mean_T1 = (dy_TD * y_TD).mean(-1, keepdim=True)
    return dy_TD.sub_(y_TD.mul_(mean_T1)).mul_(r_T1).to(x_TD.dtype)


def _inverse_rms(x_TD: Tensor, eps: float) -> Tensor:
    return x_TD.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
