"""Sums over ranks: in rank order and in fp32 or wider, so that every backend and size can be held
against the same arithmetic."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are added: fp32 at least; integers as they are."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def sum_in_order(parts: Iterable[Tensor], count: int, out: Tensor) -> None:
    """out = ((parts[0] + parts[1]) + parts[2]) + …, `count` ≥ 2 of them.

    All have one shape. Added in out's dtype or fp32, the wider; rounded to out's dtype at the end.
    `out` may be one of the parts. Each part is asked for when it is added, so that a part still on
    its way is waited for no sooner.
    """
    dtype = wide(out.dtype)
    total = out
    for index, part in enumerate(parts):
        if index == 0:
            total = part.to(dtype)  # not a copy where the part is wide already: never written to
        elif index == count - 1:
            torch.add(total, part, out=out)
        elif index == 1:
            total = total + part
        else:
            total += part
