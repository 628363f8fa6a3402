"""What the host sends to the device, which it does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`.

    To a GPU it goes from pinned memory: a plain copy waits for all that is queued there, once a
    micro-batch.
    """
    if x.is_cuda or device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
