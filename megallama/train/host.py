"""The one place where values come back from the device.

Reading a value makes the host wait for everything queued before it, so a step does it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megallama.dist.group import Group
from megallama.dist.handle import Done, Handle


@dataclass(frozen=True)
class Reading:
    """Values on their way to the host, one transfer for all."""

    values: Handle[Tensor]
    lengths: Sequence[int]

    def finish(self) -> list[list[float]]:
        """Wait for them. A dry run's have no values: zeros are read."""
        values = self.values.wait()
        values = torch.zeros_like(values, device="cpu") if values.is_meta else values.cpu()
        return [piece.tolist() for piece in values.split(list(self.lengths))]


def begin_reading(*tensors: Tensor, over: Group | None = None) -> Reading:
    """Start to read 1-D tensors back; as their sum over a group's ranks where one is given.

    The sum is one collective in fp64, with the same bits on every rank.
    """
    values = torch.cat([t.double() for t in tensors])
    summed = Done(values) if over is None else over.all_reduce(values)
    return Reading(summed, [len(t) for t in tensors])


def read_back(*tensors: Tensor, over: Group | None = None) -> list[list[float]]:
    """Each 1-D tensor as a list. See `begin_reading`."""
    return begin_reading(*tensors, over=over).finish()
