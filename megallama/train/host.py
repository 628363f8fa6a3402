"""The one place where values come back from the device.

Reading a value makes the host wait for everything queued before it, so a step does it once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def read_back(*tensors: Tensor) -> list[list[float]]:
    """Each 1-D tensor as a list, in one transfer."""
    lengths = [len(t) for t in tensors]
    values = torch.cat([t.double() for t in tensors]).cpu()
    return [piece.tolist() for piece in values.split(lengths)]
