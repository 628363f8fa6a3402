"""What ops ask of their arguments. Errors name the op's argument: a wrong one is a caller's bug."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: fp64 has kernels on the CPU only; elsewhere the references take it.
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of this type are kept in."""
    return torch.promote_types(dtype, torch.float32)


def floating(name: str, x: Tensor) -> None:
    """Raises TypeError unless x is of a type that kernels take."""
    if x.dtype not in FLOATING:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
        raise TypeError(f"{name} is of {x.dtype}; one of {names} is needed")


def matrix(name: str, x: Tensor) -> tuple[int, int]:
    """The shape of a matrix with contiguous rows, of a type that kernels take.

    Raises TypeError for another type, ValueError for another shape or stride.
    """
    floating(name, x)
    if x.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; a matrix is needed")
    operand(name, x, x.shape, x)
    return x.shape[0], x.shape[1]


def contiguous(name: str, x: Tensor) -> None:
    """Raises ValueError unless x's elements lie in order without gaps."""
    if not x.is_contiguous():
        raise ValueError(f"{name} has strides {x.stride()}; contiguous elements are needed")


def operand(
    name: str, x: Tensor, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Hold x against a shape, the device of `like`, and `dtype`, or that of `like`.

    Raises TypeError for another dtype, ValueError for another device or shape, or where the last
    dimension is not contiguous.
    """
    dtype = dtype or like.dtype
    if x.dtype != dtype:
        raise TypeError(f"{name} is of {x.dtype}; {dtype} is needed")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}; {like.device} is needed")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; {tuple(shape)} is needed")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name} has stride {x.stride(-1)} in its last dimension; 1 is needed")


def result(
    name: str, x: Tensor, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None
) -> None:
    """`operand`, for a tensor that is written: its rows must not share memory (ValueError)."""
    operand(name, x, shape, like, dtype)
    size = 1
    for length, stride in sorted(zip(x.shape, x.stride(), strict=True), key=lambda dim: dim[1]):
        if length > 1 and stride < size:
            raise ValueError(f"{name} has overlapping rows: strides {x.stride()} of {x.shape}")
        size = max(size, (length - 1) * stride + size)
