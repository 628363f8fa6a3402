"""AdamW (arXiv 1711.05101) on the wide masters, which also rounds the weights from them.

Weight decay is for matrices only. Where csrc/ was not compiled for the GPU, apex's fused kernel
makes the update if it is there.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megallama.config.schema import Optimizer
from megallama.kernels import native
from megallama.kernels.adamw import AdamWUpdate, adamw_
from megallama.parallel.state import ParameterState


@dataclass(frozen=True)
class _Owned:
    """What the update of one parameter reads and writes: this data rank's rows of it."""

    weight_decay: float
    master: Tensor
    gradient: Tensor
    moments: tuple[Tensor, Tensor]
    weight: Tensor | None


class AdamW:
    """The moments of a state's parameters, and their update. Moments have the masters' dtype."""

    def __init__(self, config: Optimizer, state: ParameterState) -> None:
        self.config = config
        self.updates = 0
        self.exp_avg = {name: torch.zeros_like(master) for name, master in state.masters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(m) for name, m in state.masters.items()}
        self._owned = [
            _Owned(
                config.weight_decay if shard.parameter.decays else 0.0,
                state.masters[shard.name],
                state.own_gradients[shard.name],
                (self.exp_avg[shard.name], self.exp_avg_sq[shard.name]),
                state.own_weights.get(shard.name),
            )
            for shard in state.table
        ]

    def step(self, lr: float, divisor: Tensor) -> None:
        """Apply one update with the gradients g / `divisor`, a scalar tensor on their device."""
        self.updates += 1
        if _apex_stands_in(divisor):
            self._step_by_apex(lr, divisor)
            return
        for one in self._owned:
            update = AdamWUpdate(
                lr, self.config.betas, self.config.eps, one.weight_decay, self.updates
            )
            adamw_(update, one.master, one.gradient, one.moments, divisor, one.weight)

    def _step_by_apex(self, lr: float, divisor: Tensor) -> None:
        for weight_decay in {one.weight_decay for one in self._owned}:
            group = [one for one in self._owned if one.weight_decay == weight_decay]
            _apex_adamw(group, self.config, lr, self.updates, divisor)


def _apex_adamw(
    group: Sequence[_Owned], config: Optimizer, lr: float, update: int, divisor: Tensor
) -> None:
    """Update parameters of one weight decay."""
    kernels: Any = importlib.import_module("amp_C")
    apply: Any = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
    masters = [one.master for one in group]
    # Apart from the kernel, which divides by nothing.
    gradients = torch._foreach_div([one.gradient for one in group], divisor)
    apply(
        kernels.multi_tensor_adam,
        torch.zeros(1, dtype=torch.int32, device=divisor.device),
        [gradients, masters, *zip(*(one.moments for one in group), strict=True)],
        lr,
        *config.betas,
        config.eps,
        update,
        1,  # decoupled weight decay: AdamW
        1,  # bias correction
        group[0].weight_decay,
    )
    for one in group:
        if one.weight is not None:
            one.weight.copy_(one.master)


def _apex_stands_in(x: Tensor) -> bool:
    """Whether there is no kernel of ours for x's device, but apex's."""
    missing = x.is_cuda and native.variant_for(x) is None
    return missing and importlib.util.find_spec("amp_C") is not None
