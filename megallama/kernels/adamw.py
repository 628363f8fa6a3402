"""AdamW (arXiv 1711.05101) in one pass over a parameter's fp32 (fp64) master.

m ← β₁·m + (1−β₁)·g, v ← β₂·v + (1−β₂)·g², w ← w − lr·(m̂ / (√v̂ + ε) + λ·w), in the order of
operations of torch's fused kernel, and the weight that the model computes with, rounded from w.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from megallama.kernels import check, native
from megallama.kernels.op import define


@dataclass(frozen=True)
class AdamWUpdate:
    """The numbers of one update; `number` counts them from 1."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    number: int

    def factors(self) -> list[float]:
        """As struct AdamW of csrc/ops.h has them."""
        beta1, beta2 = self.betas
        return [
            1 - self.lr * self.weight_decay,
            1 - beta1,
            beta2,
            1 - beta2,
            self.lr / (1 - beta1**self.number),
            math.sqrt(1 - beta2**self.number),
            self.eps,
        ]


def adamw_(
    update: AdamWUpdate,
    master: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    divisor: Tensor,
    weight: Tensor | None = None,
) -> None:
    """Update `master` and the moments (m, v) in place with gradient / divisor.

    All contiguous and of one shape. `divisor` has one element and may lie on a device: nothing
    waits for it. The gradient is left as it is. `weight`, of a dtype no wider than the master's,
    receives the rounded master.
    """
    _adamw(master, gradient, *moments, divisor, weight, update.factors())


def _reference(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    divisor: Tensor,
    weight: Tensor | None,
    factors: Sequence[float],
) -> None:
    decay, toward_gradient, beta2, square_share, step_size, root_correction, eps = factors
    g = gradient / divisor
    exp_avg.lerp_(g, toward_gradient)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=square_share)
    root = exp_avg_sq.sqrt().div_(root_correction).add_(eps)
    master.mul_(decay).addcdiv_(exp_avg, root, value=-step_size)
    if weight is not None:
        weight.copy_(master)


def _check(
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    divisor: Tensor,
    weight: Tensor | None,
    factors: Sequence[float],
) -> None:
    if check.wide(master.dtype) != master.dtype:
        raise TypeError(f"master is of {master.dtype}; torch.float32 or torch.float64 is needed")
    check.contiguous("master", master)
    moments = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, x in {"gradient": gradient, **moments}.items():
        check.contiguous(name, x)
        check.operand(name, x, master.shape, master)
    check.operand("divisor", divisor.reshape(-1), (1,), master)
    if weight is not None:
        check.contiguous("weight", weight)
        check.floating("weight", weight)
        if check.wide(weight.dtype) != master.dtype:
            raise TypeError(f"weight is of {weight.dtype}; a master of {master.dtype} is not its")
        check.operand("weight", weight, master.shape, master, weight.dtype)
    if len(factors) != 7:
        raise ValueError(f"factors has {len(factors)} numbers; 7 are needed")


def _run(
    variant: ModuleType,
    master: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    divisor: Tensor,
    weight: Tensor | None,
    factors: Sequence[float],
) -> None:
    launch = native.launch(master if weight is None else weight, 1, master.numel())
    tensors = (master, gradient, exp_avg, exp_avg_sq, weight, divisor)
    operands = [native.rows(x if x is None else x.view(-1)) for x in tensors]
    variant.adamw(launch, *operands, tuple(factors))


_adamw = define(
    "adamw(Tensor(a!) master, Tensor gradient, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
    "Tensor divisor, Tensor(d!)? weight, float[] factors) -> ()",
    _check,
    _run,
    _reference,
)
