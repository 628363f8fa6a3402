"""The squared norm on a GPU: the bodies of tests/unit with another `device`, and past 32 bits."""

from __future__ import annotations

import torch

from megallama.kernels.squared_norm import squared_norms
from tests.gpu.large import needs_memory
from tests.unit.kernels.test_squared_norm import *  # noqa: F403


def test_more_elements_than_32_bits_count(device):
    """Sums of whole numbers are exact."""
    count = 2**31 + 7
    needs_memory(device, 6)
    x = torch.ones(count, dtype=torch.bfloat16, device=device)
    x[-1] = 3
    assert squared_norms([x]).item() == count + 8
