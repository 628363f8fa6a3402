"""AdamW's kernel against torch's fused one, and against closed forms."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megallama.kernels import adamw
from megallama.kernels.adamw import AdamWUpdate, adamw_
from megallama.kernels.check import wide
from tests.unit.kernels.operands import (
    Operands,
    assert_as_good,
    best_variant,
    error,
    every_dtype,
    examples,
)

UPDATE = AdamWUpdate(lr=1e-2, betas=(0.8, 0.97), eps=1e-6, weight_decay=0.3, number=1)
WIDE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
every_offset = pytest.mark.parametrize("offset", [0, 1])


def tensors(
    device: torch.device, dtype: torch.dtype, count: int, offset: int = 0
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """A master, a gradient and moments, starting `offset` elements off."""
    operands = Operands(device, dtype, seed=count)
    w, g, m, v = (operands(count + offset)[offset:] for _ in range(4))
    return w, g, (m, v.square_())


def by_torch(update: AdamWUpdate, w: Tensor, g: Tensor, moments: tuple[Tensor, Tensor]) -> None:
    torch._fused_adamw_(
        [w],
        [g],
        [moments[0]],
        [moments[1]],
        [],
        [torch.full((), float(update.number), device=w.device)],
        lr=update.lr,
        beta1=update.betas[0],
        beta2=update.betas[1],
        weight_decay=update.weight_decay,
        eps=update.eps,
        amsgrad=False,
        maximize=False,
    )


def after(
    kernel: Any, dtype: torch.dtype, start: tuple[Any, ...], device: torch.device
) -> list[Tensor]:
    """Master and moments after five updates whose gradients and divisors differ."""
    w, g, (m, v) = start
    w, m, v = (x.to(device, dtype, copy=True) for x in (w, m, v))
    for number in range(1, 6):
        divisor = torch.full((), 6.0 + number, dtype=dtype, device=device)
        update = replace(UPDATE, lr=1e-2 / number, number=number)
        kernel(update, w, g.to(device, dtype).roll(number), (m, v), divisor)
    return [w, m, v]


def divided_by_torch(
    update: AdamWUpdate, w: Tensor, g: Tensor, moments: tuple[Tensor, Tensor], divisor: Tensor
) -> None:
    by_torch(update, w, g / divisor, moments)


@every_offset
@pytest.mark.parametrize("count", [1, 7, 64, 4099, 70001])
def test_fp64_is_torch_s_fused_kernel(device, count, offset):
    start = tensors(device, torch.float64, count, offset)
    theirs = after(divided_by_torch, torch.float64, start, device)
    for ours, expected in zip(after(adamw_, torch.float64, start, device), theirs, strict=True):
        assert error(ours, expected) <= 1e-15


@every_offset
@pytest.mark.parametrize("count", [1, 7, 64, 4099, 70001])
def test_fp32_is_as_good_as_torch_s_fused_kernel(device, count, offset):
    start = tensors(device, torch.float32, count, offset)
    truth = after(divided_by_torch, torch.float64, start, torch.device("cpu"))
    naive = after(divided_by_torch, torch.float32, start, device)
    for ours, plain, true in zip(
        after(adamw_, torch.float32, start, device), naive, truth, strict=True
    ):
        assert_as_good(ours, plain, true)


@every_dtype
@every_offset
@pytest.mark.parametrize("count", [1, 15, 8192, 20011])
def test_the_weight_is_the_rounded_master(device, dtype, count, offset):
    w, g, moments = tensors(device, wide(dtype), count, offset)
    alone, alone_moments = w.clone(), (moments[0].clone(), moments[1].clone())
    weight = Operands(device, dtype).empty(count + offset + 1)
    divisor = torch.ones((), dtype=w.dtype, device=device)
    adamw_(UPDATE, w, g, moments, divisor, weight[offset:-1])
    assert torch.equal(weight[offset:-1], w.to(dtype))
    assert weight[-1].isnan()
    adamw_(UPDATE, alone, g, alone_moments, divisor)
    assert torch.equal(alone, w)


@examples
@given(count=st.integers(1, 30000), cuts=st.lists(st.integers(0, 30000), max_size=3))
def test_pieces_are_the_whole(device, count, cuts):
    """Whatever the alignment, and where registers are not full, each element's bits are the same;
    the gradient is left as it was."""
    start = tensors(device, torch.float32, count)
    whole, parts = [[x.clone() for x in (start[0], *start[2])] for _ in range(2)]
    divisor, before = torch.full((1,), 7.0, device=device), start[1].clone()
    adamw_(UPDATE, whole[0], start[1], (whole[1], whole[2]), divisor)
    edges = sorted({0, count, *(cut % count for cut in cuts)})
    for first, last in itertools.pairwise(edges):
        w, m, v = (x[first:last] for x in parts)
        adamw_(UPDATE, w, start[1][first:last], (m, v), divisor)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert torch.equal(start[1], before)


@WIDE
def test_the_number_of_threads_changes_no_bit(device, dtype):
    def results() -> list[Tensor]:
        return after(adamw_, dtype, tensors(device, dtype, 100_003), device)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        torch.set_num_threads(3)
        several = results()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, several, strict=True))


def test_the_first_update_is_the_rate_times_the_sign(device):
    """m̂ / (√v̂ + ε) of one gradient is its sign; a closed form of the bias corrections."""
    g = torch.randn(3, 50, dtype=torch.float64).to(device)
    w, m, v = (torch.zeros_like(g) for _ in range(3))
    update = replace(UPDATE, lr=0.25, eps=1e-300, weight_decay=0.0)
    adamw_(update, w, g, (m, v), torch.full((), 5.0, dtype=torch.float64, device=device))
    assert torch.allclose(w, -0.25 * g.sign(), rtol=1e-14)


def test_without_a_gradient_the_master_only_decays(device):
    w = torch.full((37,), 2.0, dtype=torch.float64, device=device)
    zeros = [torch.zeros_like(w) for _ in range(3)]
    adamw_(UPDATE, w, zeros[0], (zeros[1], zeros[2]), torch.ones_like(w[:1]))
    assert torch.allclose(w, torch.full_like(w, 2.0 * (1 - 1e-2 * 0.3)), rtol=1e-15)


@pytest.mark.parametrize("beta1, expected", [(0.0, "g"), (1.0, "m")])
def test_the_ends_of_the_first_moment_are_exact(device, beta1, expected):
    w, g, (m, v) = tensors(device, torch.float32, 1000)
    before = {"g": g / 3, "m": m.clone()}
    factors = UPDATE.factors()
    factors[1] = 1 - beta1  # alone: at β₁ = 1 there is no bias correction
    adamw._adamw(w, g, m, v, torch.full((), 3.0, device=device), None, factors)
    assert torch.equal(m, before[expected])


@WIDE
def test_no_elements(device, dtype):
    w, g, moments = tensors(device, dtype, 0)
    adamw_(UPDATE, w, g, moments, torch.ones((), dtype=dtype, device=device))


def good(
    device: torch.device, weight: torch.dtype | None = torch.bfloat16, dtype: Any = torch.float32
) -> dict[str, Any]:
    """The op's arguments by name, in the schema's order."""
    w, g, (m, v) = tensors(device, dtype, 12)
    return dict(
        master=w.view(3, 4),
        gradient=g.view(3, 4),
        exp_avg=m.view(3, 4),
        exp_avg_sq=v.view(3, 4),
        divisor=torch.ones((), dtype=dtype, device=device),
        weight=torch.empty(3, 4, dtype=weight, device=device) if weight else None,
        factors=UPDATE.factors(),
    )


@best_variant
@WIDE
@pytest.mark.parametrize("copied", [False, True], ids=["alone", "copied"])
def test_opcheck(device, dtype, copied):
    arguments = good(device, dtype if copied else None, dtype)
    torch.library.opcheck(adamw._adamw, tuple(arguments.values()))


@pytest.mark.parametrize("name", list(good(torch.device("cpu")))[:-1])
@pytest.mark.parametrize(
    "wrong, error",
    [
        (lambda x: x.int(), TypeError),
        (lambda x: x.double(), TypeError),
        (lambda x: torch.cat((x.view(-1), x.view(-1))), ValueError),
        (lambda x: torch.stack((x.view(-1), x.view(-1)), dim=1)[:, 0], ValueError),
        (lambda x: x.to("meta"), ValueError),
    ],
    ids=["integers", "another type", "longer", "elements apart", "another device"],
)
def test_a_wrong_tensor_is_named(name, wrong, error):
    arguments = good(torch.device("cpu"))
    arguments[name] = wrong(arguments[name])
    if name == "divisor" and arguments[name].shape == (1,):
        adamw._adamw(*arguments.values())  # one element is one element
        return
    # What the master is held against is named, where it is the master that has changed.
    with pytest.raises(error, match=r"." if name == "master" else rf"\b{name}\b"):
        adamw._adamw(*arguments.values())


def test_a_matrix_that_is_turned_and_missing_factors_are_named():
    arguments = good(torch.device("cpu"))
    for name in ("master", "gradient", "exp_avg", "exp_avg_sq", "weight"):
        turned = arguments[name].new_empty(4, 3).T
        with pytest.raises(ValueError, match=rf"\b{name}\b.*contiguous"):
            adamw._adamw(*(arguments | {name: turned}).values())
    with pytest.raises(ValueError, match="factors has 6 numbers"):
        adamw._adamw(*(arguments | {"factors": UPDATE.factors()[:6]}).values())
