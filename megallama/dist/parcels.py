"""How the rows of many tensors travel: small ones packed together, large ones from where they lie.

A tensor (R, …) shared among n ranks is seen as (n, m): row r is rank r's share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Bytes a rank from which a tensor travels alone. A message costs about 50 µs between two processes
#: of a two-core machine; copying 128 KiB into and out of a parcel costs as much.
ALONE = 128 * 1024


def by_rank(x: Tensor, size: int) -> Tensor:
    """A contiguous (R, …) tensor as (size, m). A view."""
    return x.view(size, x.numel() // size)


@dataclass
class Parcel:
    """Tensors that travel as one message a peer, in `wire`.

    `views`: each tensor as (size, m), all of one dtype.
    """

    views: list[Tensor]
    wire: torch.dtype

    def packed(self) -> Tensor:
        """What travels, (size, width): row p is rank p's share of every tensor in turn.

        The tensor itself where it is one that needs no rounding.
        """
        if len(self.views) == 1:
            return self.views[0].to(self.wire)
        return torch.cat([view.to(self.wire) for view in self.views], dim=1)

    def result(self, rank: int) -> Tensor:
        """Room for a sum of rank `rank`'s row, in the tensors' dtype: (width,).

        The row itself where it is one tensor's.
        """
        if len(self.views) == 1:
            return self.views[0][rank]
        width = sum(view.shape[1] for view in self.views)
        return self.views[0].new_empty(width)

    def unpack(self, row: Tensor, rank: int) -> None:
        """Put `row` (width,) where rank `rank`'s shares lie, unless it lies there already."""
        parts = row.split([view.shape[1] for view in self.views])
        for view, part in zip(self.views, parts, strict=True):
            if view[rank].data_ptr() != part.data_ptr():
                view[rank].copy_(part)


def parcels(tensors: Sequence[Tensor], size: int, wire: torch.dtype | None = None) -> list[Parcel]:
    """The parcels of (R, …) tensors, the same on every rank that has tensors of these shapes."""
    large: list[Parcel] = []
    small: dict[torch.dtype, Parcel] = {}
    for tensor in tensors:
        view, dtype = by_rank(tensor, size), wire or tensor.dtype
        if view.shape[1] * dtype.itemsize >= ALONE:
            large.append(Parcel([view], dtype))
        else:
            small.setdefault(tensor.dtype, Parcel([], dtype)).views.append(view)
    return [*large, *small.values()]
