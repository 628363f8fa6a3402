"""RoPE on a GPU: the bodies of tests/unit with another `device`, and LLaMA's shapes."""

from __future__ import annotations

import torch

from megallama.kernels import rope
from megallama.kernels.rope import rope_backward, rope_forward
from tests.gpu.large import (
    TOKENS,
    Large,
    assert_as_good,
    every_offset,
    every_width,
    needs_memory,
)
from tests.unit.kernels.test_rope import *  # noqa: F403

HEAD = 128


@every_offset
@every_width
def test_forward_and_backward_of_llama(device, width, offset):
    """Queries and keys of fused rows: the values behind them stay."""
    large, heads = Large(device, offset), width // HEAD
    qkv = large(TOKENS, 3 * width).unflatten(1, (-1, HEAD))
    x, before = qkv[:, : 2 * heads], qkv.clone()
    angles = torch.rand(TOKENS, 1, HEAD // 2, dtype=torch.float64, device=device) * 10
    cos, sin = angles.cos().float(), angles.sin().float()
    rope_forward(x, cos, sin)
    assert torch.equal(qkv[:, 2 * heads :], before[:, 2 * heads :])
    naive = before[:, : 2 * heads].clone()
    rope._reference(naive, cos, sin, False)
    assert_as_good(x, naive, turned(before[:, : 2 * heads], cos, sin))
    rope_backward(before[:, : 2 * heads], cos, -sin)
    assert torch.equal(before, qkv), "the inverse rotation by the negative angle"


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.double().chunk(2, dim=-1)
    product = torch.complex(a, b) * torch.complex(cos.double(), sin.double())
    return torch.cat((product.real, product.imag), dim=-1)


def test_more_elements_than_32_bits_count(device):
    tokens, heads = 2**18 + 3, 64
    needs_memory(device, 8)
    large = Large(device)
    x = large.empty(tokens, heads, HEAD)
    x[:-4], x[-4:] = 0, large(4, heads, HEAD)
    angles = torch.rand(tokens, 1, HEAD // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    alone = x[-4:].clone()
    rope_forward(alone, cos[-4:], sin[-4:])
    rope_forward(x, cos, sin)
    assert torch.equal(x[-4:], alone)
