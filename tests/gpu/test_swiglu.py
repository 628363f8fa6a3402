"""SwiGLU on a GPU: the bodies of tests/unit with another `device`, and LLaMA's shapes."""

from __future__ import annotations

import torch

from megallama.kernels import swiglu
from megallama.kernels.swiglu import swiglu_backward, swiglu_forward
from tests.gpu.large import (
    LLAMA,
    TOKENS,
    Large,
    assert_as_good,
    every_offset,
    every_width,
    needs_memory,
)
from tests.unit.kernels.test_swiglu import *  # noqa: F403
from tests.unit.kernels.test_swiglu import true_swiglu


@every_offset
@every_width
def test_forward_and_backward_of_llama(device, width, offset):
    large, inner = Large(device, offset), LLAMA[width][0]
    gate_up, dact = large(TOKENS, 2 * inner, scale=3.0), large(TOKENS, inner)
    act = swiglu_forward(gate_up, out=large.empty(TOKENS, inner))
    dgate_up, again = swiglu_backward(dact, gate_up, out=large.empty(TOKENS, 2 * inner))
    assert torch.equal(again, act)
    naive, dnaive = torch.empty_like(again), torch.empty_like(gate_up)
    swiglu._backward_reference(dact, gate_up, dnaive, naive)
    leaf = gate_up.double().requires_grad_()
    truth = true_swiglu(leaf)
    (dtruth,) = torch.autograd.grad(truth, leaf, dact.double())
    assert_as_good(act, naive, truth.detach())
    for ours, plain, true in zip(
        *(x.chunk(2, dim=-1) for x in (dgate_up, dnaive, dtruth)), strict=True
    ):
        assert_as_good(ours, plain, true.clone())


def test_more_elements_than_32_bits_count(device):
    rows, inner = 2**17 + 3, 8192
    needs_memory(device, 10)
    large = Large(device)
    gate_up, dact = large.empty(rows, 2 * inner), large(4, inner)
    gate_up[:-4], gate_up[-4:] = 0, large(4, 2 * inner)
    last = gate_up[-4:].clone()
    assert torch.equal(swiglu_forward(gate_up)[-4:], swiglu_forward(last))
    whole = dact[:1].expand(rows, inner).contiguous()
    whole[-4:] = dact
    expected, _ = swiglu_backward(dact, last)
    dgate_up, _ = swiglu_backward(whole, gate_up, out=gate_up)
    assert torch.equal(dgate_up[-4:], expected)
