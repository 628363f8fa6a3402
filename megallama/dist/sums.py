"""Sums over ranks: in rank order and in fp32 or wider, so that every backend and size can be held
against the same arithmetic."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are added: fp32 at least; integers as they are."""
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def room_bytes(part: torch.dtype, out: Tensor, count: int) -> int:
    """What `sum_in_order` of so many parts needs to add up in, besides `out`."""
    dtype = wide(out.dtype)
    return out.numel() * dtype.itemsize if count > 2 or part != dtype else 0


def sum_in_order(parts: Iterable[Tensor], count: int, out: Tensor, room: Tensor) -> None:
    """out = ((parts[0] + parts[1]) + parts[2]) + …, `count` ≥ 2 of them.

    All have one shape. Added in out's dtype or fp32, the wider; rounded to out's dtype at the end.
    `out` may be one of the parts. Each part is asked for when it is added, so that a part still on
    its way is waited for no sooner. `room`: `room_bytes` of memory or more, which is written to.
    """
    dtype = wide(out.dtype)
    total = out
    for index, part in enumerate(parts):
        if index == 0 and part.dtype == dtype:
            total = part  # not a copy: never written to
        elif index == count - 1:
            torch.add(total, part, out=out)
        else:
            sums = room[: out.numel() * dtype.itemsize].view(dtype).view(out.shape)
            total = sums.copy_(part) if index == 0 else torch.add(total, part, out=sums)
