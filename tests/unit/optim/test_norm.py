"""The global gradient norm and the clip factor."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megallama.optim.norm import clip_factor, squared_norms

positive = st.floats(1e-6, 1e6)


def test_squared_norms_are_one_a_gradient_in_order():
    gradients = [torch.tensor([3.0, 4.0]), torch.ones(2, 3), torch.zeros(4)]
    found = squared_norms(gradients)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([25.0, 6.0, 0.0])


def test_a_large_fp32_gradient_loses_nothing():
    """Summed naively in fp32, 16M elements lose 7e-4 on a CPU."""
    gradient = torch.randn(32_000, 512, generator=torch.Generator().manual_seed(0))
    exact = gradient.double().square().sum().item()
    assert squared_norms([gradient]).item() == pytest.approx(exact, rel=1e-7)


def test_a_non_finite_element_shows():
    for bad in (math.inf, math.nan):
        found = squared_norms([torch.tensor([1.0, bad]), torch.ones(2)])
        assert torch.isfinite(found).tolist() == [False, True]


@given(norm=positive, clip=positive)
def test_clip_factor_is_torch_s(norm, clip):
    weight = torch.zeros(1, dtype=torch.float64)
    weight.grad = torch.full((1,), norm, dtype=torch.float64)
    torch.nn.utils.clip_grad_norm_([weight], clip)
    assert clip_factor(norm, clip) * norm == pytest.approx(weight.grad.item(), rel=1e-14)


@given(norm=positive)
def test_no_clipping(norm):
    assert clip_factor(norm, None) == clip_factor(norm, 0.0) == 1.0
    assert clip_factor(0.0, 1.0) == 1.0
