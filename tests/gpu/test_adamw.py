"""AdamW on a GPU: the bodies of tests/unit with another `device`, and a parameter past 32 bits."""

from __future__ import annotations

import torch

from megallama.kernels.adamw import adamw_
from tests.gpu.large import needs_memory
from tests.unit.kernels.test_adamw import *  # noqa: F403
from tests.unit.kernels.test_adamw import UPDATE


def test_more_elements_than_32_bits_count(device):
    """The last ones, whose number is no multiple of a chunk, as by themselves."""
    count, last = 2**31 + 7, 4099
    needs_memory(device, 40)
    w, g, m, v = (torch.zeros(count, device=device) for _ in range(4))
    for x in (w, g, m, v):
        x[-last:] = torch.rand(last, device=device)
    weight = torch.empty(count, dtype=torch.bfloat16, device=device)
    alone = [x[-last:].clone() for x in (w, g, m, v)]
    divisor = torch.full((), 3.0, device=device)
    adamw_(UPDATE, w, g, (m, v), divisor, weight)
    adamw_(UPDATE, alone[0], alone[1], (alone[2], alone[3]), divisor)
    for ours, expected in zip((w, m, v), (alone[0], *alone[2:]), strict=True):
        assert torch.equal(ours[-last:], expected)
    assert torch.equal(weight[-last:], w[-last:].bfloat16())
    assert not w[:-last].any()
