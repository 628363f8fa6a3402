"""The one place where values come back from the device.

Reading a value makes the host wait for everything queued before it, so a step does it once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megallama.dist.group import Group


def read_back(*tensors: Tensor, over: Group | None = None) -> list[list[float]]:
    """Each 1-D tensor as a list, in one transfer; as its sum over a group's ranks where given.

    The sum is one collective in fp64, with the same bits on every rank.
    """
    lengths = [len(t) for t in tensors]
    values = torch.cat([t.double() for t in tensors])
    if over is not None:
        values = over.all_reduce(values).wait()
    return [piece.tolist() for piece in values.cpu().split(lengths)]
