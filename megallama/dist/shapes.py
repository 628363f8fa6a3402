"""What the operations of every backend check before they start, and the results they make room for.

A wrong shape is a bug in the caller and raises ValueError at the call, on the rank that made it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gathered(x: Tensor, size: int, out: Tensor | None) -> Tensor:
    """Room for an all-gather of x (t, …): `out` (T, …) if it fits, else a new tensor."""
    if x.dim() == 0:
        raise ValueError("all_gather stacks along dim 0, and a scalar has none")
    shape = (size * x.shape[0], *x.shape[1:])
    if out is None:
        return torch.empty(shape, dtype=x.dtype, device=x.device)
    if out.shape != shape or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(
            f"all_gather of {size} shards {tuple(x.shape)} {x.dtype} fills a contiguous {shape}, "
            f"not {tuple(out.shape)} {out.dtype} of strides {out.stride()}"
        )
    return out


def scattered(x: Tensor, size: int) -> Tensor:
    """Room for a reduce-scatter of x (T, …): (t, …)."""
    if x.dim() == 0 or x.shape[0] % size:
        raise ValueError(
            f"reduce_scatter of {tuple(x.shape)}: dim 0 is not a multiple of {size} ranks"
        )
    return torch.empty((x.shape[0] // size, *x.shape[1:]), dtype=x.dtype, device=x.device)


def check_rows(tensors: Sequence[Tensor], size: int) -> None:
    """Each tensor is contiguous, its dim 0 a multiple of `size`."""
    for x in tensors:
        if x.dim() == 0 or x.shape[0] % size or not x.is_contiguous():
            raise ValueError(
                f"rows of {tuple(x.shape)}, strides {x.stride()}, cannot be shared among {size} "
                "ranks: a contiguous tensor is needed, its dim 0 a multiple of the ranks"
            )


def check_peer(name: str, rank: int, size: int, peer: int) -> None:
    """`peer` is another rank of the group."""
    if not 0 <= peer < size or peer == rank:
        raise ValueError(f"group {name!r} of {size} ranks: rank {rank} has no peer {peer}")


def check_filled(out: Tensor) -> None:
    """`out` can be received into."""
    if not out.is_contiguous():
        raise ValueError(f"receive fills a contiguous tensor, not one of strides {out.stride()}")
