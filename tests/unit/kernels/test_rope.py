"""RoPE's kernels against multiplication by complex numbers in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megallama.kernels import rope
from megallama.kernels.rope import rope_backward, rope_forward
from tests.unit.kernels.operands import (
    Operands,
    assert_as_good,
    best_variant,
    every_dtype,
    every_layout,
    examples,
)

#: (tokens, heads that turn, heads of a row, head width)
SHAPES = [(1, 1, 1, 2), (3, 2, 3, 6), (5, 4, 6, 32), (2, 3, 5, 70), (9, 12, 16, 64), (4, 8, 8, 128)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def tables(x: Tensor, layout: str = "contiguous") -> tuple[Tensor, Tensor]:
    """Cosines and sines of random angles for x (T, H, E), in the memory layout that is named."""
    tokens, _, width = x.shape
    wide = Operands(x.device, torch.promote_types(x.dtype, torch.float32), layout, seed=7)
    angles = wide(tokens, 1, width // 2, scale=10.0)
    cos, sin = wide.empty(*angles.shape), wide.empty(*angles.shape)
    return cos.copy_(angles.cos()), sin.copy_(angles.sin())


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x's pairs as complex numbers, times cos + i·sin."""
    a, b = x.double().cpu().chunk(2, dim=-1)
    product = torch.complex(a, b) * torch.complex(cos.double().cpu(), sin.double().cpu())
    return torch.cat((product.real, product.imag), dim=-1)


def check_rope(operands: Operands, shape: tuple[int, int, int, int]) -> None:
    """In place on some heads of a row: forward, and with the sines' signs changed backward."""
    tokens, heads, every, width = shape
    for rotate, inverse in ((rope_forward, False), (rope_backward, True)):
        row = operands(tokens, every * width).unflatten(1, (every, width))
        x = row[:, :heads]
        cos, sin = tables(x, operands.layout)
        before, rest, naive = x.clone(), row[:, heads:].clone(), x.clone()
        rotate(x, cos, sin)
        rope._reference(naive, cos, sin, inverse)
        assert_as_good(x, naive, turned(before, cos, -sin if inverse else sin))
        assert torch.equal(row[:, heads:], rest), "the other heads of the row"


@every_dtype
@every_layout
@every_shape
def test_some_heads_of_fused_rows(device, dtype, layout, shape):
    check_rope(Operands(device, dtype, layout), shape)


@examples
@given(
    tokens=st.integers(1, 12),
    heads=st.integers(1, 5),
    rest=st.integers(0, 3),
    half=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_any_shape(device, tokens, heads, rest, half, seed):
    operands = Operands(device, torch.bfloat16, "misaligned" if seed % 2 else "contiguous", seed)
    check_rope(operands, (tokens, heads, heads + rest, 2 * half))


@every_dtype
def test_the_backward_undoes_the_forward(device, dtype):
    operands = Operands(device, dtype)
    x = operands(6, 3, 48)
    back = x.clone()
    cos, sin = tables(x)
    rope_forward(back, cos, sin)
    rope_backward(back, cos, sin)
    # Two roundings of an element, each no larger than a pair's length times the unit.
    pair = x.double().unflatten(-1, (2, 24)).norm(dim=-2).repeat(1, 1, 2)
    assert ((back.double() - x.double()).abs() <= 4 * torch.finfo(dtype).eps * pair).all()


@pytest.mark.parametrize("shape", [(0, 2, 8), (3, 0, 8), (3, 2, 0)], ids=str)
def test_no_elements(device, shape):
    x = Operands(device, torch.float32)(*shape) if shape[2] else torch.empty(shape, device=device)
    cos, sin = (torch.ones(shape[0], 1, shape[2] // 2, device=device) for _ in range(2))
    rope_forward(x, cos, sin)
    rope_backward(x, cos, sin)


@best_variant
@every_dtype
def test_opcheck(device, dtype):
    x = Operands(device, dtype)(4, 3, 16)
    cos, sin = tables(x)
    torch.library.opcheck(rope._rope, (x.clone(), cos, sin, False))
    torch.library.opcheck(rope._rope, (x, cos, sin, True))
