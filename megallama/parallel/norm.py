"""RMSNorm of a sequence shard: every rank normalises its own tokens with the whole weight.

Its weight's gradient is then a sum over this rank's tokens only; `zero` adds the ranks' together.
"""

from __future__ import annotations

from torch import Tensor

from megallama.dist.handle import Handle
from megallama.kernels.rms_norm import (
    add_rms_norm_forward,
    rms_norm_backward,
    rms_norm_forward,
)
from megallama.parallel.state import ParameterState


class SequenceParallelRMSNorm:
    """The norm's weight and its passes over (t, D)."""

    def __init__(self, name: str, state: ParameterState, eps: float) -> None:
        self.name, self.state, self.eps = name, state, eps

    def weight(self) -> Handle[Tensor]:
        return self.state.weight(self.name)

    def forward(self, x_tD: Tensor, w_D: Tensor) -> Tensor:
        return rms_norm_forward(x_tD, w_D, self.eps)

    def add_forward(self, x_tD: Tensor, y_tD: Tensor, w_D: Tensor, out: Tensor) -> Tensor:
        return add_rms_norm_forward(x_tD, y_tD, w_D, self.eps, out=out)[1]

    def backward(
        self, dn_tD: Tensor, x_tD: Tensor, w_D: Tensor, residual: Tensor | None = None
    ) -> Tensor:
        dw_D = self.state.gradients[self.name]
        rms_norm_backward(dn_tD, x_tD, w_D, dw_D, self.eps, residual=residual, out=dn_tD)
        self.state.landed(self.name)
        return dn_tD
