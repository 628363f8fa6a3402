"""RMSNorm on a GPU: the bodies of tests/unit with another `device`, and LLaMA's shapes."""

from __future__ import annotations

import pytest
import torch

from megallama.kernels import rms_norm
from megallama.kernels.rms_norm import add_rms_norm_forward, rms_norm_backward, rms_norm_forward
from tests.gpu.large import (
    TOKENS,
    Large,
    assert_as_good,
    every_offset,
    every_width,
    needs_memory,
)
from tests.unit.kernels.test_rms_norm import *  # noqa: F403
from tests.unit.kernels.test_rms_norm import EPS, true_norm


@every_offset
@every_width
def test_forward_of_llama(device, width, offset):
    large = Large(device, offset)
    x, y, w = large(TOKENS, width), large(TOKENS, width), large(width)
    total, n = add_rms_norm_forward(x, y, w, EPS, out=large.empty(TOKENS, width))
    assert torch.equal(total, x + y)
    naive = torch.empty_like(total)
    rms_norm._forward_reference(total, None, w, EPS, naive, None)
    assert_as_good(n, naive, true_norm(total.double(), w.double()))
    assert torch.equal(n, rms_norm_forward(total, w, EPS, out=large.empty(TOKENS, width)))


@every_offset
@every_width
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_backward_of_llama(device, width, offset, with_residual):
    large = Large(device, offset)
    dn, x, w = large(TOKENS, width), large(TOKENS, width), large(width)
    residual = large(TOKENS, width) if with_residual else None
    dw, naive_dw = (torch.zeros(width, device=device) for _ in range(2))
    dx = rms_norm_backward(dn, x, w, dw, EPS, residual=residual, out=large.empty(TOKENS, width))
    naive = torch.empty_like(dx)
    rms_norm._backward_reference(dn, x, w, EPS, residual, naive, naive_dw)
    leaves = [t.double().requires_grad_() for t in (x, w)]
    true_dx, true_dw = torch.autograd.grad(true_norm(*leaves), leaves, dn.double())
    assert_as_good(dw, naive_dw, true_dw)
    assert_as_good(dx, naive, true_dx if residual is None else true_dx.add_(residual))


def test_more_elements_than_32_bits_count(device):
    rows, width = 2**19 + 3, 4096
    needs_memory(device, 14)
    large = Large(device)
    x, w = large.empty(rows, width), large(width)
    x[:-4], x[-4:] = 1, large(4, width)
    n = rms_norm_forward(x, w, EPS)
    assert torch.equal(n[-4:], rms_norm_forward(x[-4:].clone(), w, EPS))
    dw, alone = (torch.zeros(width, device=device) for _ in range(2))
    x[:-4] = 0
    dx = rms_norm_backward(x, x, w, dw, EPS, out=n)
    assert torch.equal(dx[-4:], rms_norm_backward(x[-4:].clone(), x[-4:].clone(), w, alone, EPS))
    assert torch.allclose(dw, alone)  # the other rows' gradients are zero
