"""Flash attention's kernels against autograd over plain softmax attention in fp64.

T tokens, H query heads, K key/value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megallama.kernels import attention
from megallama.kernels.attention import attention_backward, attention_forward
from tests.unit.kernels.operands import (
    Operands,
    assert_as_good,
    best_variant,
    every_dtype,
    every_layout,
    examples,
    gradients,
)

#: Segment lengths, H, K, E: around a block's 64 and its parts, grouped heads, widths that are no
#: multiple of anything.
Shape = tuple[tuple[int, ...], int, int, int]
SHAPES: list[Shape] = [
    ((1,), 1, 1, 1),
    ((3, 1, 17), 4, 2, 8),
    ((64, 63, 65), 2, 2, 16),
    ((200,), 2, 1, 64),
    ((33, 97), 3, 1, 80),
    ((130,), 1, 1, 128),
    ((7, 40), 4, 4, 33),
    ((70,), 1, 1, 300),
]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Problem:
    """Operands of one shape: q, k and v are views of fused rows, as in the passes."""

    def __init__(self, operands: Operands, shape: Shape, scale: float = 1.0) -> None:
        self.lengths, heads, keys, width = shape
        tokens, self.split = sum(self.lengths), (heads, keys, keys)
        self.fused = operands(tokens, heads + 2 * keys, width, scale=scale)
        self.q, self.k, self.v = self.fused.split(self.split, dim=1)
        self.do = operands(tokens, heads, width)
        self.dfused = operands.empty(*self.fused.shape)

    def run(self) -> dict[str, Tensor]:
        """The op's five results; gradients go into views of fused rows."""
        qkv = (self.q, self.k, self.v)
        o, lse = attention_forward(*qkv, self.lengths)
        out = self.dfused.split(self.split, dim=1)
        dq, dk, dv = attention_backward(self.do, qkv, o, lse, self.lengths, out=out)
        assert [x.data_ptr() for x in (dq, dk, dv)] == [x.data_ptr() for x in out]
        return dict(o=o, lse=lse, dq=dq, dk=dk, dv=dv)

    def pytorch(self) -> dict[str, Tensor]:
        """PyTorch's flash kernel's results, segment by segment."""
        found: list[list[Tensor]] = []
        tensors = (x.split(self.lengths) for x in (self.do, self.q, self.k, self.v))
        ops = torch.ops.aten
        for pieces in zip(*tensors, strict=True):
            do, q, k, v = (x.transpose(0, 1)[None] for x in pieces)
            o, lse = ops._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
            backward = ops._scaled_dot_product_flash_attention_for_cpu_backward
            some = (o, lse, *backward(do, q, k, v, o, lse, 0.0, True))
            found.append([x[0].transpose(0, 1) for x in some])
        joined = map(torch.cat, zip(*found, strict=True))
        return dict(zip(("o", "lse", "dq", "dk", "dv"), joined, strict=True))

    def truth(self) -> dict[str, Tensor]:
        """Plain attention in fp64, and autograd's gradients of it."""
        forward = partial(plain, self.lengths)
        o, lse = forward(*(x.double() for x in (self.q, self.k, self.v)))
        dq, dk, dv = gradients(lambda *x: forward(*x)[0], self.do, self.q, self.k, self.v)
        return dict(o=o, lse=lse, dq=dq, dk=dk, dv=dv)


def plain(lengths: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention of each segment with the whole matrix of scores; o and log-sum-exp."""
    found = []
    for q_S, k_S, v_S in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k_S, v_S))
        scores = q_S.transpose(0, 1) @ keys.permute(1, 2, 0) / q.shape[2] ** 0.5
        later = torch.ones(len(q_S), len(q_S)).triu(1).bool()
        scores = scores.masked_fill(later, -torch.inf)
        o = (scores.softmax(-1) @ values.transpose(0, 1)).transpose(0, 1)
        found.append((o, scores.logsumexp(-1).T))
    os, lses = zip(*found, strict=True)
    return torch.cat(os), torch.cat(lses)


def check_problem(problem: Problem) -> None:
    inputs = problem.fused.clone(), problem.do.clone()
    ours, naive, truth = problem.run(), problem.pytorch(), problem.truth()
    assert torch.equal(problem.fused, inputs[0]), "an input was written to"
    assert torch.equal(problem.do, inputs[1]), "an input was written to"
    for name, result in ours.items():
        assert_as_good(result, naive[name], truth[name], size_of(name, problem, truth[name]))


def size_of(name: str, problem: Problem, truth: Tensor) -> float | None:
    """The norm of what a result is the difference of, where that can be far above its own."""
    if name == "lse":  # largest + log Σ: near 0 by chance
        return max(float(truth.norm()), truth.numel() ** 0.5)
    if name in ("dq", "dk") and max(problem.lengths) == 1:
        # 0 for a sole key: (dp − delta)·k / √E, and both sums of E products.
        return (truth.numel() * truth.shape[-1]) ** 0.5
    return None


@every_dtype
@every_layout
@every_shape
def test_any_layout(device, dtype, layout, shape):
    check_problem(Problem(Operands(device, dtype, layout), shape))


@examples
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    group=st.integers(1, 3),
    keys=st.integers(1, 2),
    width=st.integers(1, 100),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_any_shape(device, lengths, group, keys, width, dtype, seed):
    operands = Operands(device, dtype, "misaligned" if seed % 2 else "contiguous", seed)
    check_problem(Problem(operands, (tuple(lengths), group * keys, keys, width)))


@every_dtype
def test_scores_of_any_size(device, dtype):
    """e^score would overflow; softmax picks one key, and its gradient is that key's alone."""
    scale = 200.0 if dtype == torch.float16 else 1e17
    problem = Problem(Operands(device, dtype), ((1, 150), 2, 1, 64), scale)
    ours, truth = problem.run(), problem.truth()
    assert truth["lse"].abs().max() > 1e4
    for name in ("o", "lse", "dv"):
        assert_as_good(ours[name], ours[name], truth[name])
    assert all(result.isfinite().all() for result in ours.values())


@every_dtype
def test_a_sole_key_is_all_there_is(device, dtype):
    problem = Problem(Operands(device, dtype), ((1, 1, 1, 1), 4, 4, 24))
    ours = problem.run()
    assert torch.equal(ours["o"], problem.v)
    assert torch.equal(ours["dv"], problem.do)
    wide = ours["lse"].dtype
    assert_as_good(ours["lse"], ours["lse"], (problem.q.to(wide) * problem.k).sum(-1) / 24**0.5)
    for name in ("dq", "dk"):  # differences of equal sums of 24 products
        assert ours[name].abs().max() <= 100 * torch.finfo(wide).eps


@every_dtype
def test_nothing_comes_from_later_tokens(device, dtype):
    operands = Operands(device, dtype)
    problem = Problem(operands, ((5, 160), 2, 1, 32))
    before = {name: x.clone() for name, x in problem.run().items()}
    problem.fused[100:] = operands(65, 4, 32)
    for name, x in problem.run().items():
        if name in ("o", "lse", "dq"):
            assert torch.equal(x[:100], before[name][:100])
        assert not torch.equal(x[100:], before[name][100:])


@every_dtype
def test_what_is_not_a_number_stays_in_its_segment_and_is_not_lost(device, dtype):
    problem = Problem(Operands(device, dtype), ((70, 90, 5), 2, 1, 32))
    before = {name: x.clone() for name, x in problem.run().items()}
    problem.k[120] = torch.nan
    after = problem.run()
    for name, x in after.items():
        assert torch.equal(x[:70], before[name][:70])
        assert torch.equal(x[160:], before[name][160:])
    assert after["o"][120:160].isnan().all()
    assert after["lse"][120:160].isnan().all()
    assert after["dq"][120:160].isnan().all()
    assert after["dv"][70:160].isnan().all()


def bits(problem: Problem, threads: int) -> dict[str, Tensor]:
    torch.set_num_threads(threads)
    return {name: x.clone() for name, x in problem.run().items()}


#: More heads than threads, as many, and fewer: then a head's blocks are divided as well.
@pytest.mark.parametrize("shape", [((200, 20), 6, 3, 32), ((300,), 4, 1, 40), ((130,), 3, 3, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_threads_and_repetition_change_no_bit(device, dtype, shape):
    problem = Problem(Operands(device, dtype), shape)
    expected = bits(problem, 1)
    other = Problem(Operands(device, dtype, seed=1), ((310,), 3, 3, 48))
    other.fused.fill_(torch.nan)
    for threads in (1, 2, 3):
        other.run()  # leaves its own numbers in the threads' memory
        found = bits(problem, threads)
        assert all(torch.equal(found[name], x) for name, x in expected.items()), threads


@every_dtype
def test_neither_other_heads_nor_other_segments_change_a_bit(device, dtype):
    """As tensor parallelism divides heads, and micro-batches samples."""
    whole = Problem(Operands(device, dtype), ((70, 140, 33), 6, 3, 32))
    expected = whole.run()
    part = Problem(Operands(device, dtype), ((140,), 2, 1, 32))
    queries, keys, tokens = slice(2, 4), slice(1, 2), slice(70, 210)
    for x, y, heads in (
        (part.q, whole.q, queries),
        (part.k, whole.k, keys),
        (part.v, whole.v, keys),
        (part.do, whole.do, queries),
    ):
        x.copy_(y[tokens, heads])
    for name, x in part.run().items():
        assert torch.equal(x, expected[name][tokens, keys if name in ("dk", "dv") else queries])


def test_no_tokens(device):
    problem = Problem(Operands(device, torch.bfloat16), ((), 2, 1, 16))
    assert [len(x) for x in problem.run().values()] == [0] * 5


def good(op: str) -> dict[str, Any]:
    """The arguments of one op by name, in the schema's order: 4 tokens, H 4, K 2, E 8."""

    def new(heads: int) -> Tensor:
        return torch.ones(4, heads, 8, dtype=torch.bfloat16)

    inputs, results = dict(q=new(4), k=new(2), v=new(2)), dict(o=new(4), lse=torch.ones(4, 4))
    if op == "forward":
        return inputs | dict(lengths=[1, 3]) | results
    gradients = dict(dq=new(4), dk=new(2), dv=new(2))
    return dict(do=new(4)) | inputs | results | dict(lengths=[1, 3]) | gradients


OPS = {"forward": attention._forward, "backward": attention._backward}
RESULTS = {"forward": ("o", "lse"), "backward": ("dq", "dk", "dv")}
TENSORS = [(op, name) for op in OPS for name in good(op) if name != "lengths"]
WRONG: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception]]] = {
    "integers": (lambda x: x.int(), TypeError),
    "another type": (lambda x: x.half(), TypeError),
    "a column less": (lambda x: x[..., :-1], ValueError),
    "a row more": (lambda x: torch.cat((x, x[:1])), ValueError),
    "a dimension more": (lambda x: x[None], ValueError),
    "elements apart": (lambda x: torch.stack((x, x), -1)[..., 0], ValueError),
    "another device": (lambda x: x.to("meta"), ValueError),
}


def call(op: str, **changed: Any) -> None:
    OPS[op](*(good(op) | changed).values())


@pytest.mark.parametrize("wrong, error", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("op, name", TENSORS)
def test_a_wrong_tensor_is_named(op, name, wrong, error):
    call(op)
    # Where it is q, the first that disagrees with it may be the one that is named.
    with pytest.raises(error, match=None if name == "q" else rf"\b{name}\b"):
        call(op, **{name: wrong(good(op)[name])})


@pytest.mark.parametrize("op, name", [(op, name) for op in OPS for name in RESULTS[op]])
def test_a_result_that_overlaps_itself_is_named(op, name):
    x = good(op)[name]
    with pytest.raises(ValueError, match=rf"\b{name}\b.*overlapping"):
        call(op, **{name: x[:1].expand(x.shape)})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("lengths", [[], [4, 1], [5, -1]], ids=str)
def test_lengths_that_are_not_the_tokens_are_named(op, lengths):
    with pytest.raises(ValueError, match=r"\blengths\b.*sum is 4"):
        call(op, lengths=lengths)


@pytest.mark.parametrize("op", OPS)
def test_heads_that_do_not_divide_are_named(op):
    keys = torch.ones(4, 3, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="q has 4 heads; a multiple of k's 3"):
        call(op, k=keys, v=keys)


@best_variant
def test_opcheck(device):
    problem = Problem(Operands(device, torch.bfloat16), ((2, 5), 4, 2, 8))
    x = problem.run()
    qkv, out = (problem.q, problem.k, problem.v), problem.dfused.split(problem.split, dim=1)
    torch.library.opcheck(attention._forward, (*qkv, [2, 5], x["o"], x["lse"]))
    backward = (problem.do, *qkv, x["o"], x["lse"], [2, 5], *out)
    torch.library.opcheck(attention._backward, backward)
