"""Holding an op pair against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Pair(torch.autograd.Function):
    """A forward and the backward that is claimed to be its own."""

    @staticmethod
    def forward(ctx: Any, forward: Callable, backward: Callable, *inputs: Tensor) -> Tensor:
        ctx.backward_of_pair = backward
        ctx.save_for_backward(*inputs)
        return forward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        gradients = ctx.backward_of_pair(dy.contiguous(), *ctx.saved_tensors)
        return None, None, *gradients


def check_pair(forward: Callable, backward: Callable, *inputs: Tensor) -> None:
    """Assert that `backward(dy, *inputs)` is the gradient of `forward(*inputs)`, in fp64.

    `backward` returns one gradient an input. Inputs must not be written to.
    """
    before = [x.clone() for x in inputs]
    leaves = [x.clone().requires_grad_() for x in inputs]
    assert all(x.dtype == torch.float64 for x in leaves)
    assert torch.autograd.gradcheck(
        lambda *xs: _Pair.apply(forward, backward, *xs), leaves, atol=1e-8, rtol=1e-6
    )
    for leaf, x in zip(leaves, before, strict=True):
        assert torch.equal(leaf, x), "an input was overwritten"


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers in fp64."""
    generator = torch.Generator().manual_seed(seed + 1000 * len(shape) + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)
