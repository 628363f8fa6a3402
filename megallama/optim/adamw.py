"""AdamW (arXiv 1711.05101) on the wide masters, by apex's fused kernel where present, else torch's.

m ← β₁·m + (1−β₁)·g, v ← β₂·v + (1−β₂)·g², w ← w − lr·(m̂ / (√v̂ + ε) + λ·w), with weight decay λ
on matrices only.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megallama.config.schema import Optimizer
from megallama.spec.parameters import Parameter


@dataclass(frozen=True)
class _Group:
    """Parameters of one weight decay, as the kernels take them: lists in the same order."""

    weight_decay: float
    masters: list[Tensor]
    gradients: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]


class AdamW:
    """The moments of a parameter table, and their update. Moments have the masters' dtype."""

    def __init__(
        self,
        config: Optimizer,
        table: Sequence[Parameter],
        masters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
    ) -> None:
        self.config = config
        self.updates = 0
        self.exp_avg = {p.name: torch.zeros_like(masters[p.name]) for p in table}
        self.exp_avg_sq = {p.name: torch.zeros_like(masters[p.name]) for p in table}

        def group(weight_decay: float, names: list[str]) -> _Group:
            kinds = (masters, gradients, self.exp_avg, self.exp_avg_sq)
            return _Group(weight_decay, *([kind[name] for name in names] for kind in kinds))

        self._groups = [
            group(config.weight_decay, [p.name for p in table if p.decays]),
            group(0.0, [p.name for p in table if not p.decays]),
        ]

    def step(self, lr: float, divisor: Tensor) -> None:
        """Apply one update with the gradients g / `divisor`, a scalar tensor; they stay divided."""
        self.updates += 1
        kernel = _apex_adamw if _apex_present() and divisor.is_cuda else _torch_adamw
        for group in self._groups:
            # Apart from the kernel: torch's divides by fp32 only, apex's not at all.
            torch._foreach_div_(group.gradients, divisor)
            kernel(group, self.config, lr, self.updates)


def _torch_adamw(group: _Group, config: Optimizer, lr: float, update: int) -> None:
    # The kernel wants a step counter a tensor; all parameters share one.
    step = torch.full((), float(update), dtype=torch.float32, device=group.masters[0].device)
    torch._fused_adamw_(
        group.masters,
        group.gradients,
        group.exp_avgs,
        group.exp_avg_sqs,
        [],
        [step] * len(group.masters),
        lr=lr,
        beta1=config.betas[0],
        beta2=config.betas[1],
        weight_decay=group.weight_decay,
        eps=config.eps,
        amsgrad=False,
        maximize=False,
    )


def _apex_adamw(group: _Group, config: Optimizer, lr: float, update: int) -> None:
    kernels: Any = importlib.import_module("amp_C")
    apply: Any = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
    apply(
        kernels.multi_tensor_adam,
        torch.zeros(1, dtype=torch.int32, device=group.masters[0].device),
        [group.gradients, group.masters, group.exp_avgs, group.exp_avg_sqs],
        lr,
        *config.betas,
        config.eps,
        update,
        1,  # decoupled weight decay: AdamW
        1,  # bias correction
        group.weight_decay,
    )


def _apex_present() -> bool:
    return importlib.util.find_spec("amp_C") is not None
