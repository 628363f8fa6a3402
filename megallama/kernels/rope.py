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
    _rope(x_THE, cos, sin, False)


def rope_backward(dy_THE: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn the gradient after the rotation into the one before, in place: the inverse rotation."""
    _rope(dy_THE, cos, sin, True)


def _reference(x_THE: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    sin = -sin if inverse else sin
    x1, x2 = (half.to(cos.dtype) for half in x_THE.chunk(2, dim=-1))
    y1 = (x1 * cos).sub_(x2 * sin)
    y2 = (x2 * cos).add_(x1 * sin)
    half = x_THE.shape[-1] // 2
    x_THE[..., :half] = y1
    x_THE[..., half:] = y2


def _check(x_THE: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    check.floating("x", x_THE)
    if x_THE.dim() != 3 or x_THE.shape[2] % 2:
        raise ValueError(f"x has shape {tuple(x_THE.shape)}; (T, heads, E), E even, is needed")
    check.result("x", x_THE, x_THE.shape, x_THE)
    tokens, _, width = x_THE.shape
    for name, table in (("cos", cos), ("sin", sin)):
        check.operand(name, table, (tokens, 1, width // 2), x_THE, check.wide(x_THE.dtype))


def _run(variant: ModuleType, x_THE: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    tokens, heads, width = x_THE.shape
    x, launch = native.heads(x_THE), native.launch(x_THE, tokens, width // 2)
    variant.rope(launch, heads, x, native.rows(cos), native.rows(sin), inverse)


_rope = define(
    "rope(Tensor(a!) x, Tensor cos, Tensor sin, bool inverse) -> ()", _check, _run, _reference
)
