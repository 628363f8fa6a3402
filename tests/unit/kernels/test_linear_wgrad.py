"""dw += dyᵀ·x in fp32, against fp64 and the same in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megallama.kernels import linear_wgrad, native
from megallama.kernels.linear_wgrad import linear_wgrad_
from tests.unit.kernels.operands import (
    Operands,
    assert_as_good,
    best_variant,
    error,
    every_layout,
    examples,
)

narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
#: (T, O, I). Tiles are 12 × 32, 6 × 16 and 6 × 8; blocks have 256 or 512 tokens, 288 rows, about
#: 1,250 columns of dw.
SHAPES = [
    (1, 1, 1),
    (2, 12, 32),
    (3, 13, 33),
    (255, 6, 17),
    (257, 24, 64),
    (513, 35, 47),
    (1027, 5, 100),
    (40, 601, 7),
    (31, 11, 2579),
]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def problem(operands: Operands, tokens: int, outputs: int, inputs: int) -> tuple[Tensor, ...]:
    """dy, x, and a dw of its own layout that is not zero."""
    wide = Operands(operands.device, torch.float32, operands.layout, seed=1)
    return operands(tokens, outputs), operands(tokens, inputs), wide(outputs, inputs)


def truth(dy: Tensor, x: Tensor, dw: Tensor) -> Tensor:
    return dw.double() + dy.double().T @ x.double()


@narrow
@every_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(device, dtype, layout, shape):
    dy, x, dw = problem(Operands(device, dtype, layout), *shape)
    expected = truth(dy, x, dw)
    naive = dw + dy.T.float() @ x.float()
    linear_wgrad_(dy, x, dw)
    assert_as_good(dw, naive, expected)
    assert (dw - expected).abs().max() < 1e-5 * (1 + len(dy) ** 0.5)


@narrow
@examples
@given(shape=st.tuples(st.integers(1, 600), st.integers(1, 40), st.integers(1, 90)))
def test_whole_numbers_are_exact(device, dtype, shape):
    """Sums below 2²⁴ of products of small whole numbers; every element gets its own tokens."""
    tokens, outputs, inputs = shape
    generator = torch.Generator().manual_seed(tokens * outputs + inputs)
    dy = torch.randint(-8, 9, (tokens, outputs), generator=generator)
    x = torch.randint(-8, 9, (tokens, inputs), generator=generator)
    dw = torch.full((outputs, inputs), 5.0, device=device)
    linear_wgrad_(dy.to(device, dtype), x.to(device, dtype), dw)
    assert torch.equal(dw.long().cpu(), dy.T @ x + 5)


@narrow
def test_slices_of_wider_matrices(device, dtype):
    """Rows of a larger dw from columns of a wider dy; what lies beside stays as it is."""
    operands = Operands(device, dtype)
    dy, x = operands(70, 90), operands(70, 50)
    dw = torch.full((90, 50), 3.0, device=device)
    linear_wgrad_(dy[:, 20:55], x, dw[20:55])
    expected = truth(dy[:, 20:55], x, torch.full((35, 50), 3.0, device=device))
    assert error(dw[20:55], expected) < 1e-6
    assert torch.equal(dw[:20], torch.full_like(dw[:20], 3.0))
    assert torch.equal(dw[55:], torch.full_like(dw[55:], 3.0))


def test_products_are_not_rounded_to_16_bits(device):
    """4096 + 1 needs 13 bits, and bf16 has 8; so for a sum over tokens, and over calls."""
    dy = torch.tensor([[64.0], [1.0]], device=device).bfloat16()
    dw = torch.zeros(1, 1, device=device)
    linear_wgrad_(dy, dy.clone(), dw)
    assert dw.item() == 4097
    linear_wgrad_(dy, dy.clone(), dw)
    assert dw.item() == 2 * 4097


@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
@narrow
def test_what_is_not_finite_shows_where_it_belongs(device, dtype, fault):
    dy, x = torch.ones(33, 14, device=device, dtype=dtype), torch.ones(33, 40, device=device)
    dy[32, 13] = fault
    dw = torch.zeros(14, 40, device=device)
    linear_wgrad_(dy, x.to(dtype), dw)
    assert not dw[13].isfinite().any()
    assert torch.equal(dw[:13], torch.full_like(dw[:13], 33.0))


@narrow
@pytest.mark.parametrize("shape", [(700, 300, 100), (300, 30, 2600), (600, 5, 64)], ids=str)
def test_the_bits_are_those_of_one_thread_and_of_halves(device, dtype, shape):
    """Whatever the threads, in one call or for halves of dw's rows (part = 0 or 1 of 2), twice."""
    if device.type == "cuda" or not native.variants():
        pytest.skip("a library's GEMM has no such promise")
    dy, x, dw = problem(Operands(device, dtype), *shape)
    results = []
    for count, parts in [(1, 1), (1, 1), (2, 1), (3, 1), (1, 2), (3, 2)]:
        result = dw.clone()
        with threads(count):
            for part_dy, part_dw in zip(dy.chunk(parts, dim=1), result.chunk(parts), strict=True):
                linear_wgrad_(part_dy, x, part_dw)
        results.append(result)
    assert not torch.equal(results[0], dw)
    assert all(torch.equal(result, results[0]) for result in results)


def test_tokens_of_several_calls_add_up(device):
    """Micro-batches: as good as one call on all tokens."""
    dy, x, dw = problem(Operands(device, torch.bfloat16), 768, 20, 40)
    expected, whole = truth(dy, x, dw), dw.clone()
    linear_wgrad_(dy, x, whole)
    for part_dy, part_x in zip(dy.split(256), x.split(256), strict=True):
        linear_wgrad_(part_dy, part_x, dw)
    assert_as_good(dw, whole, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_gradient_of_the_operands_own_type(device, dtype):
    dy, x = Operands(device, dtype)(9, 5), Operands(device, dtype)(9, 7)
    dw = torch.ones(5, 7, device=device, dtype=dtype)
    linear_wgrad_(dy, x, dw)
    expected = truth(dy, x, torch.ones(5, 7, device=device))
    assert error(dw, expected) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", [(0, 4, 4), (4, 0, 4), (4, 4, 0)], ids=str)
def test_no_elements(device, shape):
    tokens, outputs, inputs = shape
    dy = torch.ones(tokens, outputs, device=device, dtype=torch.bfloat16)
    x = torch.ones(tokens, inputs, device=device, dtype=torch.bfloat16)
    dw = torch.ones(outputs, inputs, device=device)
    linear_wgrad_(dy, x, dw)
    assert torch.equal(dw, torch.ones_like(dw))


@best_variant
@narrow
def test_opcheck(device, dtype):
    operands = problem(Operands(device, dtype), 10, 14, 34)
    torch.library.opcheck(linear_wgrad._linear_wgrad, operands)


@narrow
def test_the_size_of_scratch_changes_no_bit(device, dtype, monkeypatch):
    """One panel of x and a few of dy at a time: 256 steps of 32 columns, and 16 words more."""
    if device.type == "cuda" or not native.variants():
        pytest.skip("a library's GEMM has no scratch of ours")
    dy, x, dw = problem(Operands(device, dtype), 530, 50, 150)
    narrow_blocks = dw.clone()
    linear_wgrad_(dy, x, dw)
    monkeypatch.setattr(linear_wgrad, "SCRATCH", 256 * 32 + 16)
    linear_wgrad_(dy, x, narrow_blocks)
    assert torch.equal(narrow_blocks, dw)


T, O, I = 4, 6, 8  # noqa: E741


@pytest.mark.parametrize(
    "name, wrong, error",
    [
        ("dy", torch.ones(T, O), TypeError),
        ("dy", torch.ones(T, O).int(), TypeError),
        ("dy", torch.ones(T).bfloat16(), ValueError),
        ("dy", torch.ones(O, T).bfloat16().T, ValueError),
        ("x", torch.ones(T, I).half(), TypeError),
        ("x", torch.ones(T + 1, I).bfloat16(), ValueError),
        ("x", torch.ones(T, I, 1).bfloat16(), ValueError),
        ("x", torch.ones(I, T).bfloat16().T, ValueError),
        ("x", torch.ones(T, I, device="meta").bfloat16(), ValueError),
        ("dw", torch.ones(O, I).double(), TypeError),
        ("dw", torch.ones(I, O), ValueError),
        ("dw", torch.ones(I, O).T, ValueError),
        ("dw", torch.ones(1, I).expand(O, I), ValueError),
        ("dw", torch.ones(O, I, device="meta"), ValueError),
    ],
)
def test_a_wrong_tensor_is_named(name, wrong, error):
    good = dict(dy=torch.ones(T, O).bfloat16(), x=torch.ones(T, I).bfloat16(), dw=torch.ones(O, I))
    linear_wgrad._linear_wgrad(*good.values())
    with pytest.raises(error, match=rf"\b{name}\b"):
        linear_wgrad._linear_wgrad(*(good | {name: wrong}).values())
