"""The number of threads changes no bit of any result."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from megallama.kernels.rms_norm import add_rms_norm_forward, rms_norm_backward
from megallama.kernels.rope import rope_backward, rope_forward
from megallama.kernels.swiglu import swiglu_backward, swiglu_forward
from tests.unit.kernels.operands import Operands, every_dtype


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def results(dtype: torch.dtype, threads: int) -> list[Tensor]:
    """Every op's, on operands of enough elements for several threads, in uneven shares."""
    torch.set_num_threads(threads)
    operands = Operands(torch.device("cpu"), dtype)
    x, residual, dn, w = operands(301, 700), operands(301, 700), operands(301, 700), operands(700)
    wide = torch.promote_types(dtype, torch.float32)
    dw = torch.ones(700, dtype=wide)
    found = [*add_rms_norm_forward(x, residual, w, 1e-5), dw]
    found.append(rms_norm_backward(dn, x, w, dw, 1e-5, residual=residual))
    heads = x.unflatten(1, (7, 100)).clone()
    angles = torch.arange(301)[:, None, None] * torch.linspace(0, 1, 50)
    cos, sin = angles.cos().to(wide), angles.sin().to(wide)
    rope_forward(heads, cos, sin)
    found += [heads, heads.clone()]
    rope_backward(found[-1], cos, sin)
    return [*found, swiglu_forward(x), *swiglu_backward(dn[:, :350], x)]


@every_dtype
@pytest.mark.parametrize("threads", [2, 3])
def test_the_same_bits_as_one_thread(dtype, threads):
    alone, several = results(dtype, 1), results(dtype, threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, several, strict=True))
