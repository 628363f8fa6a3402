"""RMSNorm's kernels against PyTorch's own norm and its gradients in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megallama.kernels import rms_norm
from megallama.kernels.rms_norm import (
    add_rms_norm_forward,
    rms_norm_backward,
    rms_norm_forward,
)
from tests.unit.kernels.operands import (
    Operands,
    assert_as_good,
    best_variant,
    every_dtype,
    every_layout,
    examples,
    gradients,
)

EPS = 1e-5
#: Around the widths of registers, chunks and warps; LLaMA's; longer than CUDA keeps in registers.
SHAPES = [(1, 1), (5, 7), (3, 64), (2, 129), (70, 512), (4, 1032), (3, 4096), (2, 17000)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def true_norm(x: Tensor, w: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), w, EPS)


def on_cpu(*tensors: Tensor) -> list[Tensor]:
    return [x.double().cpu() for x in tensors]


def check_forward(operands: Operands, shape: tuple[int, int]) -> None:
    x, w = operands(*shape), operands(shape[1])
    n, naive = rms_norm_forward(x, w, EPS, out=operands.empty(*shape)), torch.empty_like(x)
    rms_norm._forward_reference(x, None, w, EPS, naive, None)
    assert_as_good(n, naive, true_norm(*on_cpu(x, w)))


def check_backward(operands: Operands, shape: tuple[int, int], with_residual: bool) -> None:
    dn, x, w, held = (operands(*size) for size in (shape, shape, shape[1:], shape[1:]))
    residual = operands(*shape) if with_residual else None
    wide = torch.promote_types(x.dtype, torch.float32)
    dw, naive_dw = held.to(wide, copy=True), held.to(wide, copy=True)
    dx = rms_norm_backward(dn, x, w, dw, EPS, residual=residual, out=operands.empty(*shape))
    naive_dx = torch.empty_like(x)
    rms_norm._backward_reference(dn, x, w, EPS, residual, naive_dx, naive_dw)
    true_dx, true_dw = gradients(true_norm, dn, x, w)
    if residual is not None:
        true_dx = true_dx + residual.double().cpu()
    # With one column, dx is the difference of two numbers that are equal but for ε.
    dn, x, w = on_cpu(dn, x, w)
    terms = (dn * w * (x.square().mean(-1, keepdim=True) + EPS).rsqrt()).norm()
    assert_as_good(dx, naive_dx, true_dx, float(terms))
    assert_as_good(dw, naive_dw, true_dw + held.double().cpu())


@every_dtype
@every_layout
@every_shape
def test_forward(device, dtype, layout, shape):
    check_forward(Operands(device, dtype, layout), shape)


@every_dtype
@every_layout
@every_shape
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_backward(device, dtype, layout, shape, with_residual):
    check_backward(Operands(device, dtype, layout), shape, with_residual)


@examples
@given(rows=st.integers(1, 40), columns=st.integers(1, 400), seed=st.integers(0, 99))
def test_any_shape(device, rows, columns, seed):
    operands = Operands(device, torch.bfloat16, "misaligned" if seed % 2 else "contiguous", seed)
    check_forward(operands, (rows, columns))
    check_backward(operands, (rows, columns), with_residual=seed % 3 == 0)


@every_dtype
@every_layout
@every_shape
def test_the_residual_is_added_and_the_norm_is_of_the_rounded_sum(device, dtype, layout, shape):
    """So a backward that has kept the sum alone recomputes the same norm, bit for bit."""
    operands = Operands(device, dtype, layout)
    x, residual, w = operands(*shape), operands(*shape), operands(shape[1])
    total, n = add_rms_norm_forward(x, residual, w, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(n, rms_norm_forward(total, w, EPS))


@every_dtype
def test_the_gradient_may_be_written_over_an_operand(device, dtype):
    operands = Operands(device, dtype)
    dn, x, w, residual = operands(9, 96), operands(9, 96), operands(96), operands(9, 96)
    wide = torch.promote_types(dtype, torch.float32)
    dw = [torch.zeros(96, dtype=wide, device=device) for _ in range(3)]
    apart = rms_norm_backward(dn, x, w, dw[0], EPS, residual=residual)
    over_dn, over_residual = dn.clone(), residual.clone()
    rms_norm_backward(over_dn, x, w, dw[1], EPS, residual=residual, out=over_dn)
    rms_norm_backward(dn, x, w, dw[2], EPS, residual=over_residual, out=over_residual)
    assert torch.equal(over_dn, apart)
    assert torch.equal(over_residual, apart)
    assert torch.equal(dw[1], dw[0])
    assert torch.equal(dw[2], dw[0])


@every_dtype
def test_the_same_bits_every_time(device, dtype):
    operands = Operands(device, dtype)
    dn, x, w = operands(300, 520), operands(300, 520), operands(520)
    wide = torch.promote_types(dtype, torch.float32)
    dw = [torch.zeros(520, dtype=wide, device=device) for _ in range(3)]
    dx = [rms_norm_backward(dn, x, w, sums, EPS) for sums in dw]
    assert all(torch.equal(dx[0], other) for other in dx)
    assert all(torch.equal(dw[0], other) for other in dw)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)], ids=str)
def test_no_elements(device, shape):
    operands = Operands(device, torch.float32)
    x, w, dw = operands(*shape), operands(shape[1]), torch.ones(shape[1], device=device)
    assert rms_norm_forward(x, w, EPS).shape == shape
    assert rms_norm_backward(x, x, w, dw, EPS).shape == shape
    assert (dw == 1).all()


def test_a_row_of_zeros_is_finite(device):
    x, w = torch.zeros(2, 40, device=device), torch.ones(40, device=device)
    dw = torch.zeros(40, device=device)
    dx = rms_norm_backward(torch.ones_like(x), x, w, dw, 1e-6)
    assert not rms_norm_forward(x, w, 1e-6).any()
    assert dx.allclose(torch.tensor(1e3, device=device))
    assert not dw.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_sums_round_as_pytorch_rounds_them(device, dtype):
    """Over every bit pattern: infinities, subnormals and overflow too."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(64, 1024).to(device)
    w = torch.ones(1024, dtype=dtype, device=device)
    residual = x.flatten()[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    for other in (torch.zeros_like(x), residual.view_as(x)):
        total, expected = add_rms_norm_forward(x, other, w, EPS)[0], x + other
        assert torch.equal(total.isnan(), expected.isnan())
        # AVX-512's own conversion to bf16 makes zero of subnormal numbers.
        tiny = (expected.float().abs() < torch.finfo(torch.float32).tiny) | expected.isnan()
        assert torch.equal(total[~tiny], expected[~tiny])
        assert (total[tiny].float().nan_to_num(0).abs() < torch.finfo(torch.float32).tiny).all()


@best_variant
@every_dtype
def test_opcheck(device, dtype):
    operands = Operands(device, dtype)
    x, dn, w = operands(4, 24), operands(4, 24), operands(24)
    dw = torch.zeros(24, dtype=torch.promote_types(dtype, torch.float32), device=device)
    forward, backward = rms_norm._forward, rms_norm._backward
    torch.library.opcheck(forward, (x, None, w, EPS, torch.empty_like(x), None))
    torch.library.opcheck(forward, (x, dn, w, EPS, torch.empty_like(x), torch.empty_like(x)))
    torch.library.opcheck(backward, (dn, x, w, EPS, None, torch.empty_like(x), dw))
    torch.library.opcheck(backward, (dn, x, w, EPS, x.clone(), torch.empty_like(x), dw))
