"""SwiGLU (arXiv 2002.05202): act = silu(gate) · up, with gate and up the halves of one GEMM."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu_forward(gate_up_TF: Tensor) -> Tensor:
    """(T, 2F) → (T, F)."""
    gate, up = gate_up_TF.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def swiglu_backward(dact_TF: Tensor, gate_up_TF: Tensor) -> tuple[Tensor, Tensor]:
    """Return d(gate_up) (T, 2F) and the forward's output (T, F), which W2's wgrad needs.

    silu(g) = g·s with s = sigmoid(g), and silu'(g) = s·(1 + g·(1 − s)).
    """
    gate, up = gate_up_TF.chunk(2, dim=-1)
    silu = torch.nn.functional.silu(gate)
    dgate_up = torch.empty_like(gate_up_TF)
    dgate, dup = dgate_up.chunk(2, dim=-1)
    torch.mul(dact_TF, silu, out=dup)
    torch.ops.aten.silu_backward.grad_input(dact_TF * up, gate, grad_input=dgate)
    return dgate_up, silu.mul_(up)
