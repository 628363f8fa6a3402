"""Column- and row-parallel linears (Megatron-LM, arXiv 1909.08053; sequence parallel, 2205.05198).

Both run the same three GEMMs on the shard that this rank holds. They differ in what is divided:
a column-parallel weight by its outputs, so its input must be whole and its input's gradient is a
partial sum; a row-parallel one by its inputs, so its output is a partial sum and its output's
gradient must be whole. The collectives that follow from that are `TokenShards`'.
"""

from __future__ import annotations

from torch import Tensor

from megallama.autograd.linear import linear_dgrad, linear_forward, linear_wgrad
from megallama.dist.handle import Handle
from megallama.parallel.state import ParameterState


class ParallelLinear:
    """A linear's shard and its GEMMs."""

    def __init__(self, name: str, state: ParameterState) -> None:
        self.name, self.state = name, state

    def weight(self) -> Handle[Tensor]:
        return self.state.weight(self.name)

    def forward(self, x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
        return linear_forward(x, w, out)

    def dgrad(self, dy: Tensor, w: Tensor) -> Tensor:
        return linear_dgrad(dy, w)

    def wgrad(self, dy: Tensor, x: Tensor, part: int = 0, parts: int = 1) -> None:
        dw = self.state.gradients[self.name]
        linear_wgrad(dy.chunk(parts, dim=1)[part], x, dw.chunk(parts)[part])
        if part == parts - 1:
            self.state.landed(self.name)


class ColumnParallelLinear(ParallelLinear):
    """x_tD gathered → x_TD · w_fDᵀ = y_Tf; backward dy_Tf · w_fD = dx_TD, scattered → dx_tD."""


class RowParallelLinear(ParallelLinear):
    """x_Tf · w_Dfᵀ = y_TD, scattered → y_tD; backward dy_tD gathered → dy_TD · w_Df = dx_Tf."""
