"""RMSNorm (arXiv 1910.07467): n = x / √(mean(x²) + ε) · w, over the last dimension.

The statistics are computed in fp32 (fp64 under fp64) and recomputed in the backward: they cost one
read of x, which the backward needs anyway. T tokens, D model width.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from megallama.kernels import check, native
from megallama.kernels.op import define


def rms_norm_forward(x_TD: Tensor, w_D: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """(T, D), (D,) → (T, D), into `out` where it is given."""
    n_TD = torch.empty_like(x_TD) if out is None else out
    _forward(x_TD, None, w_D, eps, n_TD, None)
    return n_TD


def add_rms_norm_forward(
    x_TD: Tensor, residual_TD: Tensor, w_D: Tensor, eps: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return x + residual, into `out` where it is given, and its norm.

    The norm is of the rounded sum, as the backward recomputes it.
    """
    sum_TD = torch.empty_like(x_TD) if out is None else out
    n_TD = torch.empty_like(x_TD)
    _forward(x_TD, residual_TD, w_D, eps, n_TD, sum_TD)
    return sum_TD, n_TD


def rms_norm_backward(
    dn_TD: Tensor,
    x_TD: Tensor,
    w_D: Tensor,
    dw_D: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Return dx (T, D) and add dw into `dw_D`, of fp32 or wider.

    With r = 1/√(mean(x²) + ε) and y = r·x: dw = Σ_T dn·y, dx = r·(dn·w − y·mean(dn·w·y)).
    `residual`: the gradient of x's other use (T, D), which dx includes. dx goes into `out` where
    that is given, which may be `dn_TD` or `residual` itself.
    """
    dx_TD = torch.empty_like(x_TD) if out is None else out
    _backward(dn_TD, x_TD, w_D, eps, residual, dx_TD, dw_D)
    return dx_TD


def _forward_reference(
    x_TD: Tensor,
    residual_TD: Tensor | None,
    w_D: Tensor,
    eps: float,
    n_TD: Tensor,
    sum_TD: Tensor | None,
) -> None:
    if residual_TD is not None and sum_TD is not None:
        x_TD = torch.add(x_TD, residual_TD, out=sum_TD)
    wide = x_TD.to(check.wide(x_TD.dtype))
    n_TD.copy_((wide * _inverse_rms(wide, eps)).mul_(w_D))


def _backward_reference(
    dn_TD: Tensor,
    x_TD: Tensor,
    w_D: Tensor,
    eps: float,
    residual_TD: Tensor | None,
    dx_TD: Tensor,
    dw_D: Tensor,
) -> None:
    wide, dn = (t.to(check.wide(x_TD.dtype)) for t in (x_TD, dn_TD))
    r_T1 = _inverse_rms(wide, eps)
    y_TD = wide * r_T1
    dw_D.add_((dn * y_TD).sum(0))
    dy_TD = dn * w_D
    mean_T1 = (dy_TD * y_TD).mean(-1, keepdim=True)
    dy_TD.sub_(y_TD.mul_(mean_T1)).mul_(r_T1)
    dx_TD.copy_(dy_TD if residual_TD is None else dy_TD.add_(residual_TD))


def _inverse_rms(x_TD: Tensor, eps: float) -> Tensor:
    return x_TD.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def _forward_check(
    x_TD: Tensor,
    residual_TD: Tensor | None,
    w_D: Tensor,
    eps: float,
    n_TD: Tensor,
    sum_TD: Tensor | None,
) -> None:
    shape = check.matrix("x", x_TD)
    check.operand("w", w_D, shape[1:], x_TD)
    check.result("n", n_TD, shape, x_TD)
    if (residual_TD is None) != (sum_TD is None):
        raise ValueError("residual and sum are needed together: the one is added into the other")
    if residual_TD is not None and sum_TD is not None:
        check.operand("residual", residual_TD, shape, x_TD)
        check.result("sum", sum_TD, shape, x_TD)


def _forward_run(
    variant: ModuleType,
    x_TD: Tensor,
    residual_TD: Tensor | None,
    w_D: Tensor,
    eps: float,
    n_TD: Tensor,
    sum_TD: Tensor | None,
) -> None:
    x, residual, w = map(native.rows, (x_TD, residual_TD, w_D))
    launch = native.launch(x_TD, *x_TD.shape)
    variant.rms_norm_forward(launch, x, residual, w, eps, native.rows(n_TD), native.rows(sum_TD))


def _backward_check(
    dn_TD: Tensor,
    x_TD: Tensor,
    w_D: Tensor,
    eps: float,
    residual_TD: Tensor | None,
    dx_TD: Tensor,
    dw_D: Tensor,
) -> None:
    shape = check.matrix("x", x_TD)
    check.operand("dn", dn_TD, shape, x_TD)
    check.operand("w", w_D, shape[1:], x_TD)
    if residual_TD is not None:
        check.operand("residual", residual_TD, shape, x_TD)
    check.result("dx", dx_TD, shape, x_TD)
    check.result("dw", dw_D, shape[1:], x_TD, check.wide(x_TD.dtype))


def _backward_run(
    variant: ModuleType,
    dn_TD: Tensor,
    x_TD: Tensor,
    w_D: Tensor,
    eps: float,
    residual_TD: Tensor | None,
    dx_TD: Tensor,
    dw_D: Tensor,
) -> None:
    dn, x, w, residual, dx = map(native.rows, (dn_TD, x_TD, w_D, residual_TD, dx_TD))
    shares, columns = native.share_count(x_TD), x_TD.shape[1]
    partials = torch.empty(shares, columns, dtype=dw_D.dtype, device=dw_D.device)
    partial_sums = (partials.data_ptr(), shares)
    launch = native.launch(x_TD, *x_TD.shape)
    variant.rms_norm_backward(launch, dn, x, w, eps, residual, dx, partial_sums)
    variant.add_partials(native.launch(dw_D, 1, columns), partial_sums, native.rows(dw_D))


_forward = define(
    "rms_norm_forward"
    "(Tensor x, Tensor? residual, Tensor w, float eps, Tensor(a!) n, Tensor(b!)? sum) -> ()",
    _forward_check,
    _forward_run,
    _forward_reference,
)
_backward = define(
    "rms_norm_backward(Tensor dn, Tensor x, Tensor w, float eps, Tensor? residual, "
    "Tensor(a!) dx, Tensor(b!) dw) -> ()",
    _backward_check,
    _backward_run,
    _backward_reference,
)
