"""Σ x² of whole tensors, in fp64: an fp32 number's square is exact there and cannot overflow.

The order of additions depends on the number of elements alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from megallama.kernels import check, native
from megallama.kernels.op import define

#: Elements to a partial sum: enough work for a thread's turn, enough turns for a GPU.
SHARE = 65536


def squared_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Σ x² of each tensor, in order: (n,) fp64. Contiguous, one or more, on one device."""
    out = tensors[0].new_empty(len(tensors), dtype=torch.float64)
    for x, sum_1 in zip(tensors, out.split(1), strict=True):
        _squared_norm(x, out.new_empty(-(-x.numel() // SHARE)), sum_1)
    return out


def _reference(x: Tensor, partials: Tensor, sum_1: Tensor) -> None:
    # In pieces, so that the fp64 copy is never that of a whole tensor.
    for index, partial in enumerate(partials):
        piece = x.view(-1)[index * SHARE : (index + 1) * SHARE]
        partial.copy_(piece.double().square().sum())
    sum_1.copy_(partials.sum())


def _check(x: Tensor, partials: Tensor, sum_1: Tensor) -> None:
    check.floating("x", x)
    check.contiguous("x", x)
    check.result("partials", partials, (-(-x.numel() // SHARE),), x, torch.float64)
    check.operand("sum", sum_1, (1,), x, torch.float64)


def _run(variant: ModuleType, x: Tensor, partials: Tensor, sum_1: Tensor) -> None:
    launch = native.launch(x, len(partials), x.numel())
    variant.squared_norm(launch, *map(native.rows, (x.view(-1), partials, sum_1)))


_squared_norm = define(
    "squared_norm(Tensor x, Tensor(a!) partials, Tensor(b!) sum) -> ()", _check, _run, _reference
)
