"""A linear layer's three GEMMs: y = x·wᵀ, dx = dy·w, dw += dyᵀ·x.

The backward is two functions because the two are wanted at different times: dgrad is on the path to
the previous layer, wgrad is not and fills the time that communication takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megallama.kernels.linear_wgrad import linear_wgrad_


def linear_forward(x_TI: Tensor, w_OI: Tensor, out: Tensor | None = None) -> Tensor:
    """(T, I) · (O, I) → (T, O), into `out` where given."""
    return torch.mm(x_TI, w_OI.T, out=out)


def linear_dgrad(dy_TO: Tensor, w_OI: Tensor, out: Tensor | None = None) -> Tensor:
    """(T, O) · (O, I) → (T, I), into `out` where given."""
    return torch.mm(dy_TO, w_OI, out=out)


def linear_wgrad(dy_TO: Tensor, x_TI: Tensor, dw_OI: Tensor) -> None:
    """Add (O, T) · (T, I) into `dw_OI`, which may be fp32 under operands of 16 bits."""
    linear_wgrad_(dy_TO, x_TI, dw_OI)
