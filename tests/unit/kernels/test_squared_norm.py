"""Σ x² in fp64, against exactly rounded sums."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megallama.kernels import native, squared_norm
from megallama.kernels.squared_norm import SHARE, squared_norms
from tests.unit.kernels.operands import Operands, best_variant, every_dtype, examples

COUNTS = [1, 7, 64, 4099, 2 * SHARE + 1]


@every_dtype
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("count", COUNTS)
def test_against_exactly_rounded_sums(device, dtype, count, offset):
    x = Operands(device, dtype)(count + offset)[offset:]
    expected = math.fsum(value * value for value in x.double().tolist())
    assert squared_norms([x]).item() == pytest.approx(expected, rel=1e-14, abs=0)


@examples
@given(counts=st.lists(st.integers(0, 3000), min_size=1, max_size=5))
def test_each_tensor_s_in_order(device, counts):
    """Sums of whole numbers are exact; a tensor's neighbours in memory do not count."""
    memory = torch.arange(sum(counts), device=device) % 100
    pieces = memory.float().split(counts)
    expected = [int((piece.long() ** 2).sum()) for piece in pieces]
    sums = squared_norms(pieces)
    assert sums.dtype == torch.float64
    assert sums.tolist() == expected


def test_what_fp32_loses(device):
    """Ones after a square that is 2²⁴ times theirs; squares beyond fp32's range."""
    x = torch.ones(100_000, device=device)
    x[0] = 4096.0
    assert squared_norms([x]).item() == 2**24 + 99_999
    y = torch.tensor([[1e30, 0.0], [1e-30, 0.0]], device=device)
    expected = [float(row[0].double()) ** 2 for row in y]
    assert squared_norms(list(y)).tolist() == expected


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_what_is_not_finite_shows(device, fault):
    x = torch.ones(2 * SHARE + 3, device=device)
    for place in (0, SHARE, 2 * SHARE + 2):
        y = x.clone()
        y[place] = fault
        assert not squared_norms([y]).isfinite().any()


@every_dtype
@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(device, dtype, threads):
    if not native.variants():
        pytest.skip("PyTorch's own sums depend on the number of threads")
    x = Operands(device, dtype)(5 * SHARE + 77)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = squared_norms([x])
        torch.set_num_threads(threads)
        several = squared_norms([x])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, several)


@best_variant
@every_dtype
def test_opcheck(device, dtype):
    x = Operands(device, dtype)(3, 50)
    partials, total = (torch.empty(1, dtype=torch.float64, device=device) for _ in range(2))
    torch.library.opcheck(squared_norm._squared_norm, (x, partials, total))


@pytest.mark.parametrize(
    "name, wrong, error",
    [
        ("x", torch.ones(4, 3).int(), TypeError),
        ("x", torch.ones(4, 3).T, ValueError),
        ("partials", torch.ones(1), TypeError),
        ("partials", torch.ones(0).double(), ValueError),
        ("sum", torch.ones(1), TypeError),
        ("sum", torch.ones(2).double(), ValueError),
        ("sum", torch.ones(1, device="meta").double(), ValueError),
    ],
)
def test_a_wrong_tensor_is_named(name, wrong, error):
    one = torch.ones(1, dtype=torch.float64)
    arguments = dict(x=torch.ones(4, 3), partials=one, sum=one.clone()) | {name: wrong}
    with pytest.raises(error, match=rf"\b{name}\b"):
        squared_norm._squared_norm(*arguments.values())
