"""RMSNorm of a sequence shard: every rank normalises its own tokens with the whole weight.

Its weight's gradient is then a sum over this rank's tokens only; `zero` adds the ranks' together.
"""

from __future__ import annotations

from torch import Tensor

from megallama.autograd.norm import rms_norm_backward, rms_norm_forward
from megallama.dist.handle import Handle
from megallama.parallel.state import ParameterState


class SequenceParallelRMSNorm:
    """The norm's weight and its passes over (t, D)."""

    def __init__(self, name: str, state: ParameterState, eps: float) -> None:
        self.name, self.state, self.eps = name, state, eps

    def weight(self) -> Handle[Tensor]:
        return self.state.weight(self.name)

    def forward(self, x_tD: Tensor, w_D: Tensor) -> Tensor:
        return rms_norm_forward(x_tD, w_D, self.eps)

    def backward(self, dn_tD: Tensor, x_tD: Tensor, w_D: Tensor) -> Tensor:
        dx_tD = rms_norm_backward(dn_tD, x_tD, w_D, self.state.gradients[self.name], self.eps)
        self.state.landed(self.name)
        return dx_tD
