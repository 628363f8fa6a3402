"""SwiGLU's kernels against PyTorch's own silu and its gradients in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megallama.kernels import swiglu
from megallama.kernels.swiglu import swiglu_backward, swiglu_forward
from tests.unit.kernels.operands import (
    Operands,
    assert_as_good,
    best_variant,
    every_dtype,
    every_layout,
    examples,
    gradients,
)

SHAPES = [(1, 1), (5, 7), (3, 64), (2, 129), (40, 344), (3, 1376), (2, 11008)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def true_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def check_swiglu(operands: Operands, shape: tuple[int, int]) -> None:
    tokens, width = shape
    gate_up, dact = operands(tokens, 2 * width, scale=3.0), operands(tokens, width)
    act = swiglu_forward(gate_up, out=operands.empty(tokens, width))
    naive, dnaive = torch.empty_like(act), torch.empty_like(gate_up)
    swiglu._backward_reference(dact, gate_up, dnaive, naive)
    assert_as_good(act, naive, true_swiglu(gate_up.double().cpu()))
    dgate_up, again = swiglu_backward(dact, gate_up, out=operands.empty(tokens, 2 * width))
    assert torch.equal(again, act), "the output that W2's wgrad needs is the forward's"
    (truth,) = gradients(true_swiglu, dact, gate_up)
    for ours, plain, true in zip(
        *(x.chunk(2, dim=-1) for x in (dgate_up, dnaive, truth)), strict=True
    ):
        assert_as_good(ours, plain, true)


@every_dtype
@every_layout
@every_shape
def test_forward_and_backward(device, dtype, layout, shape):
    check_swiglu(Operands(device, dtype, layout), shape)


@examples
@given(rows=st.integers(1, 40), width=st.integers(1, 400), seed=st.integers(0, 99))
def test_any_shape(device, rows, width, seed):
    layout = "misaligned" if seed % 2 else "contiguous"
    check_swiglu(Operands(device, torch.bfloat16, layout, seed), (rows, width))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_gates_of_any_size(device, dtype):
    """Element by element: the exponential from where it vanishes to where it overflows."""
    gate = torch.linspace(-80, 80, 4001, dtype=dtype, device=device)
    gate_up = torch.stack((gate, torch.ones_like(gate))).flatten()[None]
    true = true_swiglu(gate_up.double().cpu())[0]
    ours, naive = (
        ((act[0].double().cpu() - true).abs() / true.abs().clamp_min(1e-300)).max()
        for act in (swiglu_forward(gate_up), true_swiglu(gate_up))
    )
    assert ours <= max(2 * naive, 8 * torch.finfo(dtype).eps)


@every_dtype
def test_extreme_gates_give_the_limits(device, dtype):
    big = torch.finfo(dtype).max
    gate = torch.tensor([-big, -1e4, -200.0, 200.0, 1e4, big, float("nan")], dtype=dtype)
    gate_up = torch.cat((gate, torch.ones(7, dtype=dtype)))[None].to(device)
    dgate_up, act = swiglu_backward(torch.ones(1, 7, dtype=dtype, device=device), gate_up)
    expected = torch.tensor([0.0, 0.0, 0.0, 200.0, 1e4, big, float("nan")], dtype=dtype)
    assert torch.allclose(act[0].cpu(), expected, rtol=0, atol=1e-30, equal_nan=True)
    assert torch.allclose(
        dgate_up[0, :7].cpu(),
        torch.tensor([0.0, 0, 0, 1, 1, 1, float("nan")], dtype=dtype),
        rtol=0,
        atol=1e-30,
        equal_nan=True,
    )


@every_dtype
def test_results_may_be_written_over_what_they_are_made_from(device, dtype):
    operands = Operands(device, dtype)
    gate_up, dact = operands(9, 2 * 96), operands(9, 96)
    apart, act = swiglu_backward(dact, gate_up)
    into, again = swiglu_backward(dact, gate_up, out=gate_up, act=dact)
    assert into is gate_up
    assert again is dact
    assert torch.equal(into, apart)
    assert torch.equal(again, act)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)], ids=str)
def test_no_elements(device, shape):
    gate_up, dact = torch.empty(shape, device=device), torch.empty(shape[0], shape[1] // 2)
    assert swiglu_forward(gate_up).shape == dact.shape
    assert swiglu_backward(dact.to(device), gate_up)[0].shape == shape


@best_variant
@every_dtype
def test_opcheck(device, dtype):
    operands = Operands(device, dtype)
    gate_up, dact = operands(4, 2 * 24), operands(4, 24)
    act, dgate_up = torch.empty_like(dact), torch.empty_like(gate_up)
    torch.library.opcheck(swiglu._forward, (gate_up, act))
    torch.library.opcheck(swiglu._backward, (dact, gate_up, dgate_up, act))
