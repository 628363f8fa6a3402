"""SwiGLU (arXiv 2002.05202): act = silu(gate) · up, with gate and up the halves of one GEMM.

T tokens, F feed-forward width.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from megallama.kernels import check, native
from megallama.kernels.op import define


def swiglu_forward(gate_up_TF: Tensor, out: Tensor | None = None) -> Tensor:
    """(T, 2F) → (T, F), into `out` where it is given."""
    act_TF = _half_as_wide(gate_up_TF) if out is None else out
    _forward(gate_up_TF, act_TF)
    return act_TF


def swiglu_backward(
    dact_TF: Tensor, gate_up_TF: Tensor, out: Tensor | None = None, act: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return d(gate_up) (T, 2F) and the forward's output (T, F), which W2's wgrad needs.

    silu(g) = g·s with s = sigmoid(g), and silu'(g) = s·(1 + g·(1 − s)). They go into `out` and
    `act` where these are given, which may be `gate_up_TF` and `dact_TF` themselves.
    """
    dgate_up_TF = torch.empty_like(gate_up_TF) if out is None else out
    act_TF = _half_as_wide(gate_up_TF) if act is None else act
    _backward(dact_TF, gate_up_TF, dgate_up_TF, act_TF)
    return dgate_up_TF, act_TF


def _half_as_wide(gate_up_TF: Tensor) -> Tensor:
    return gate_up_TF.new_empty(len(gate_up_TF), gate_up_TF.shape[-1] // 2)


def _forward_reference(gate_up_TF: Tensor, act_TF: Tensor) -> None:
    gate, up = gate_up_TF.chunk(2, dim=-1)
    torch.mul(torch.nn.functional.silu(gate), up, out=act_TF)


def _backward_reference(
    dact_TF: Tensor, gate_up_TF: Tensor, dgate_up_TF: Tensor, act_TF: Tensor
) -> None:
    gate, up = gate_up_TF.chunk(2, dim=-1)
    silu = torch.nn.functional.silu(gate)
    dgate = torch.ops.aten.silu_backward(dact_TF * up, gate)
    dup = dact_TF * silu
    torch.mul(silu, up, out=act_TF)
    for half, gradient in zip(dgate_up_TF.chunk(2, dim=-1), (dgate, dup), strict=True):
        half.copy_(gradient)


def _forward_check(gate_up_TF: Tensor, act_TF: Tensor) -> None:
    tokens, width = check.matrix("gate_up", gate_up_TF)
    if width % 2:
        raise ValueError(f"gate_up has {width} columns; an even number is needed")
    check.result("act", act_TF, (tokens, width // 2), gate_up_TF)


def _backward_check(
    dact_TF: Tensor, gate_up_TF: Tensor, dgate_up_TF: Tensor, act_TF: Tensor
) -> None:
    _forward_check(gate_up_TF, act_TF)
    check.operand("dact", dact_TF, act_TF.shape, gate_up_TF)
    check.result("dgate_up", dgate_up_TF, gate_up_TF.shape, gate_up_TF)


def _forward_run(variant: ModuleType, gate_up_TF: Tensor, act_TF: Tensor) -> None:
    launch = native.launch(act_TF, *act_TF.shape)
    variant.swiglu_forward(launch, native.rows(gate_up_TF), native.rows(act_TF))


def _backward_run(
    variant: ModuleType, dact_TF: Tensor, gate_up_TF: Tensor, dgate_up_TF: Tensor, act_TF: Tensor
) -> None:
    launch = native.launch(act_TF, *act_TF.shape)
    dact, gate_up, dgate_up, act = map(native.rows, (dact_TF, gate_up_TF, dgate_up_TF, act_TF))
    variant.swiglu_backward(launch, dact, gate_up, dgate_up, act)


_forward = define(
    "swiglu_forward(Tensor gate_up, Tensor(a!) act) -> ()",
    _forward_check,
    _forward_run,
    _forward_reference,
)
_backward = define(
    "swiglu_backward(Tensor dact, Tensor gate_up, Tensor(a!) dgate_up, Tensor(b!) act) -> ()",
    _backward_check,
    _backward_run,
    _backward_reference,
)
