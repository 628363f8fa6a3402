"""Rotary position embedding (RoFormer, arXiv 2104.09864), rotating the two halves of a head.

A rotation's backward is the inverse rotation, so nothing is saved. T tokens, H heads, E head width;
cosines and sines are (T, 1, E/2), fp32 or wider, so any positions and any scaling will do.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from megallama.kernels import check, native
from megallama.kernels.op import define


def rope_forward(x_THE: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate the heads of `x_THE` in place; it may be a view of fused query-key-value rows."""
    _rope(x_THE, None, cos, sin, False)


def rope_backward(dy_THE: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Write the gradient before the rotation into `out` (T, H, E): the inverse rotation of dy."""
    _rope(out, dy_THE, cos, sin, True)


def _reference(out_THE: Tensor, x_THE: Tensor | None, cos: Tensor, sin: Tensor, inv: bool) -> None:
    x_THE = out_THE if x_THE is None else x_THE
    sin = -sin if inv else sin
    x1, x2 = (half.to(cos.dtype) for half in x_THE.chunk(2, dim=-1))
    y1 = (x1 * cos).sub_(x2 * sin)
    y2 = (x2 * cos).add_(x1 * sin)
    half = x_THE.shape[-1] // 2
    out_THE[..., :half] = y1
    out_THE[..., half:] = y2


def _check(out_THE: Tensor, x_THE: Tensor | None, cos: Tensor, sin: Tensor, inv: bool) -> None:
    check.floating("out", out_THE)
    if out_THE.dim() != 3 or out_THE.shape[2] % 2:
        raise ValueError(f"out has shape {tuple(out_THE.shape)}; (T, heads, E), E even, is needed")
    check.result("out", out_THE, out_THE.shape, out_THE)
    if x_THE is not None:
        check.operand("x", x_THE, out_THE.shape, out_THE)
    tokens, _, width = out_THE.shape
    for name, table in (("cos", cos), ("sin", sin)):
        check.operand(name, table, (tokens, 1, width // 2), out_THE, check.wide(out_THE.dtype))


def _run(
    variant: ModuleType,
    out_THE: Tensor,
    x_THE: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    inverse: bool,
) -> None:
    tokens, heads, width = out_THE.shape
    out = native.heads(out_THE)
    x = out if x_THE is None else native.heads(x_THE)
    launch = native.launch(out_THE, tokens, width // 2)
    variant.rope(launch, heads, x, out, native.rows(cos), native.rows(sin), inverse)


_rope = define(
    "rope(Tensor(a!) out, Tensor? x, Tensor cos, Tensor sin, bool inverse) -> ()",
    _check,
    _run,
    _reference,
)
