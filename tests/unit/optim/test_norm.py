"""The clip factor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megallama.optim.norm import clip_factor

positive = st.floats(1e-6, 1e6)


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
