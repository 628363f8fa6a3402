"""The cross-entropy's kernels against PyTorch's own in fp64: a whole vocabulary, and its shards."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megallama.kernels import cross_entropy
from megallama.kernels.check import wide
from megallama.kernels.cross_entropy import (
    cross_entropy_,
    cross_entropy_gradient_,
    cross_entropy_statistics,
)
from megallama.spec.labels import IGNORE
from tests.unit.kernels.operands import (
    Operands,
    assert_as_good,
    best_variant,
    every_dtype,
    every_layout,
    examples,
    gradients,
)

#: Tokens, rows of the vocabulary, columns of padding: around the widths of registers and blocks.
SHAPES = [(1, 1, 0), (5, 7, 2), (3, 64, 0), (4, 129, 3), (9, 2048, 1), (3, 2049, 7), (2, 33000, 8)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def some_labels(tokens: int, rows: int, device: torch.device, seed: int = 0) -> Tensor:
    """The last row's and the first row's too; of five or more, the third is ignored."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, rows, (tokens,), generator=generator)
    labels[0] = rows - 1
    labels[tokens // 2] = 0
    if tokens >= 5:
        labels[2] = IGNORE
    return labels.to(device)


def true_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(
        logits, labels.cpu(), ignore_index=IGNORE, reduction="none"
    )


def truth(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The losses and the gradient of their sum, fp64."""
    x = logits.double().cpu()
    (dlogits,) = gradients(lambda x: true_loss(x, labels), torch.ones(len(labels)), x)
    return true_loss(x, labels), dlogits


def twins(operands: Operands, tokens: int, rows: int, padding: int) -> tuple[Tensor, Tensor]:
    """The same logits twice, NaN in the padding."""
    values = operands(tokens, rows, scale=3.0)
    pair = operands.empty(tokens, rows + padding), operands.empty(tokens, rows + padding)
    for logits in pair:
        logits[:, :rows] = values
    return pair


def check_whole(operands: Operands, shape: tuple[int, int, int], seed: int = 0) -> None:
    tokens, rows, padding = shape
    ours, naive = twins(operands, tokens, rows, padding)
    labels = some_labels(tokens, rows, operands.device, seed)
    loss, gradient = truth(ours[:, :rows], labels)
    naive_loss = torch.empty(tokens, dtype=wide(naive.dtype), device=naive.device)
    cross_entropy._fused_reference(naive, labels, rows, naive_loss, naive)
    our_loss = cross_entropy_(ours, labels, rows)
    if rows > 1:  # of one alone, both are exactly zero
        assert_as_good(our_loss, naive_loss, loss)
        assert_as_good(ours[:, :rows], naive[:, :rows], gradient)
    assert not ours[:, rows:].any()
    ignored = labels == IGNORE
    assert not our_loss[ignored].any()
    assert not ours[ignored].any()


def shards(rows: int, ranks: int) -> list[tuple[int, int, int]]:
    """First row, rows and columns of each rank's share: the last ranks' may be but padding."""
    height = -(-rows // ranks)
    firsts = [min(rows, rank * height) for rank in range(ranks)]
    return [(first, min(height, rows - first), height) for first in firsts]


def by_reference(x: Tensor, labels: Tensor, first: int, rows: int) -> Tensor:
    """`cross_entropy_statistics` in plain PyTorch."""
    out = torch.empty(2, len(x), dtype=wide(x.dtype), device=x.device)
    cross_entropy._statistics_reference(x, labels, first, rows, *out)
    return out


def sharded(
    pieces: list[Tensor], labels: Tensor, places: list[tuple[int, int]], statistics: Any, turn: Any
) -> tuple[Tensor, Tensor]:
    """The losses, and the shards' gradients without padding, side by side."""
    found = [statistics(piece, labels, *place) for piece, place in zip(pieces, places, strict=True)]
    log_sums, targets = torch.stack(found).unbind(1)
    lse = log_sums.logsumexp(0)
    for piece, place in zip(pieces, places, strict=True):
        turn(piece, labels, lse, *place)
        assert not piece[:, place[1] :].any()
        assert not piece[labels == IGNORE].any()
    loss = (lse - targets.sum(0)).where(labels != IGNORE, 0.0)
    return loss, torch.cat([p[:, :n] for p, (_, n) in zip(pieces, places, strict=True)], dim=1)


def check_shards(operands: Operands, tokens: int, rows: int, ranks: int, seed: int = 0) -> None:
    x = operands(tokens, rows, scale=3.0)
    labels = some_labels(tokens, rows, operands.device, seed)
    pieces = []
    for first, count, columns in shards(rows, ranks):
        pieces.append(operands.empty(tokens, columns))
        pieces[-1][:, :count] = x[:, first : first + count]
    places = [(first, count) for first, count, _ in shards(rows, ranks)]
    copies = [piece.clone() for piece in pieces]
    ours = sharded(pieces, labels, places, cross_entropy_statistics, cross_entropy_gradient_)
    naive = sharded(copies, labels, places, by_reference, cross_entropy._gradient_reference)
    for result, plain, true in zip(ours, naive, truth(x, labels), strict=True):
        assert_as_good(result, plain, true)


@every_dtype
@every_layout
@every_shape
def test_a_whole_vocabulary(device, dtype, layout, shape):
    check_whole(Operands(device, dtype, layout), shape)


@every_dtype
@every_layout
@pytest.mark.parametrize("rows, ranks", [(7, 5), (7, 8), (130, 2), (5000, 2), (4099, 3)])
def test_shards_of_a_vocabulary(device, dtype, layout, rows, ranks):
    """Seven rows over five ranks are 2, 2, 2, 1 and none but padding."""
    check_shards(Operands(device, dtype, layout), 40, rows, ranks)


@examples
@given(
    tokens=st.integers(1, 30),
    rows=st.integers(2, 300),
    ranks=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_any_shape(device, tokens, rows, ranks, seed):
    operands = Operands(device, torch.bfloat16, "misaligned" if seed % 2 else "contiguous", seed)
    check_whole(operands, (tokens, rows, ranks), seed)
    check_shards(operands, tokens, rows, ranks, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_exponential_is_right_to_two_units_in_the_last_place(device, dtype):
    """Without a target and with log Σ exp = 0, the gradient is e^x; an eighth of bf16's and of
    fp16's rounding error is 2^-12."""
    x = torch.linspace(-87.3, 0, 200_001, dtype=torch.float64).to(device, dtype)[None]
    true = x.double().exp()
    labels, zero = torch.tensor([5], device=device), torch.zeros(1, dtype=dtype, device=device)
    cross_entropy_gradient_(x, labels, zero, 10**6, x.shape[1])
    assert ((x.double() - true) / true).abs().max() <= 2 * torch.finfo(dtype).eps


@every_dtype
def test_logits_of_any_size(device, dtype):
    """A loss as large as the logits differ; the exponentials of all but one are zero."""
    x = torch.tensor([[30000.0, -30000.0, 0.0], [-30000.0, -30000.0, -30000.0]], dtype=dtype)
    expected = torch.tensor([[1.0, -1.0, 0.0], [1 / 3, 1 / 3, 1 / 3 - 1]], dtype=torch.float64)
    x, labels = x.to(device), torch.tensor([1, 2], device=device)
    big = float(x[0, 0].double() - x[0, 1].double())
    loss = cross_entropy_(x, labels, 3).double().cpu()
    true = torch.tensor([big, math.log(3)], dtype=torch.float64)
    # −30000 + log 3 in fp32 is right to 2^-10.
    assert torch.allclose(loss, true, rtol=0, atol=2e-3)
    assert torch.allclose(x.double().cpu(), expected, rtol=0, atol=2e-3)


@every_dtype
def test_a_shard_of_impossible_logits(device, dtype):
    """−∞ has no probability; where there is nothing else, or no column, the sum's logarithm is
    −∞ and combines with the other shards'."""
    x = torch.full((2, 70), -math.inf, dtype=dtype, device=device)
    labels = torch.tensor([3, 99], device=device)
    for rows in (70, 33, 0):
        log_sums, targets = cross_entropy_statistics(x, labels, 50, rows)
        assert log_sums.tolist() == [-math.inf, -math.inf]
        assert targets.tolist() == [0.0, -math.inf if rows == 70 else 0.0]
    x[0, 69] = 1.5
    log_sums, _ = cross_entropy_statistics(x, labels, 50, 70)
    assert log_sums.tolist() == [1.5, -math.inf]
    cross_entropy_gradient_(x, labels, torch.full((2,), 1.5, device=device).to(log_sums), 0, 70)
    assert x[0].nonzero().tolist() == [[3], [69]]
    assert x[0, [3, 69]].tolist() == [-1.0, 1.0]


@every_dtype
@pytest.mark.parametrize("fault", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 63, 2500, 4099])
def test_what_is_not_finite_shows_in_the_loss(device, dtype, fault, column):
    x = Operands(device, dtype)(2, 4100)
    x[0, column] = fault
    labels = torch.tensor([17, 18], device=device)
    log_sums, _ = cross_entropy_statistics(x, labels, 0, 4100)
    assert log_sums.isfinite().tolist() == [False, True]
    assert cross_entropy_(x, labels, 4100).isfinite().tolist() == [False, True]


def test_labels_that_are_no_tokens_have_no_target(device):
    x = torch.zeros(4, 8, device=device)
    labels = torch.tensor([-1, 8, 2**62, -(2**62)], device=device)
    log_sums, targets = cross_entropy_statistics(x, labels, 0, 8)
    assert torch.allclose(log_sums, torch.tensor(math.log(8), device=device))
    assert not targets.any()
    cross_entropy_gradient_(x, labels, log_sums, 0, 8)
    assert torch.allclose(x, torch.tensor(1 / 8, device=device))


@every_dtype
def test_no_tokens(device, dtype):
    x, labels = torch.empty(0, 8, dtype=dtype, device=device), torch.empty(0, device=device).long()
    assert cross_entropy_statistics(x, labels, 0, 8).shape == (2, 0)
    assert cross_entropy_(x, labels, 8).shape == (0,)


@every_dtype
@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(device, dtype, threads):
    def results() -> list[Tensor]:
        x = Operands(device, dtype)(101, 3000, scale=3.0)
        labels = some_labels(101, 2990, device)
        statistics = cross_entropy_statistics(x, labels, 0, 2990)
        gradient = cross_entropy_gradient_(x.clone(), labels, statistics[0], 0, 2990)
        return [statistics, gradient, cross_entropy_(x, labels, 2990), x]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        torch.set_num_threads(threads)
        several = results()
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, several, strict=True))


def good(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> dict[str, dict[str, Any]]:
    """Every op's arguments by name, in the schema's order."""

    def floats(*shape: int) -> Tensor:
        return torch.ones(*shape, dtype=wide(dtype), device=device)

    both = dict(
        logits=torch.ones(4, 12, dtype=dtype, device=device), labels=some_labels(4, 10, device)
    )
    return {
        "_statistics": dict(**both, first=0, rows=10, log_sums=floats(4), targets=floats(4)),
        "_gradient": dict(**both, lse=floats(4), first=0, rows=10),
        "_fused": dict(**both, rows=10, loss=floats(4), scratch=floats(2, 10)),
    }


TENSORS = [
    (op, name)
    for op, arguments in good(torch.device("cpu")).items()
    for name, value in arguments.items()
    if isinstance(value, Tensor)
]


@best_variant
@every_dtype
@pytest.mark.parametrize("op", good(torch.device("cpu")))
def test_opcheck(device, dtype, op):
    torch.library.opcheck(getattr(cross_entropy, op), tuple(good(device, dtype)[op].values()))


@pytest.mark.parametrize("op, name", TENSORS, ids=str)
@pytest.mark.parametrize(
    "wrong, error",
    [
        (lambda x: x.int(), TypeError),
        (lambda x: x[..., :-3], ValueError),
        (lambda x: x[None], ValueError),
        (lambda x: torch.stack((x, x), dim=-1)[..., 0], ValueError),
        (lambda x: x.to("meta"), ValueError),
    ],
    ids=["integers", "shorter", "a dimension more", "elements apart", "another device"],
)
def test_a_wrong_tensor_is_named(op, name, wrong, error):
    arguments = good(torch.device("cpu"))[op]
    arguments[name] = wrong(arguments[name])
    if name == "logits" and arguments[name].device.type == "meta":
        name = "labels"  # what disagrees with the logits
    with pytest.raises(error, match=rf"\b{name}\b"):
        getattr(cross_entropy, op)(*arguments.values())


@pytest.mark.parametrize("op", good(torch.device("cpu")))
def test_a_wrong_number_is_named(op):
    call, arguments = getattr(cross_entropy, op), good(torch.device("cpu"))[op]
    for rows in (-1, 13):
        with pytest.raises(ValueError, match=rf"rows is {rows}"):
            call(*(arguments | {"rows": rows}).values())
    if "first" in arguments:
        with pytest.raises(ValueError, match="first is -1"):
            call(*(arguments | {"first": -1}).values())


def test_logits_that_share_memory_and_scratch_without_rows_are_named():
    arguments = good(torch.device("cpu"))["_fused"]
    shared = arguments["logits"][:1].expand(4, 12)
    with pytest.raises(ValueError, match=r"logits.*overlapping"):
        cross_entropy._fused(*(arguments | {"logits": shared}).values())
    with pytest.raises(ValueError, match="scratch has no rows"):
        cross_entropy._fused(*(arguments | {"scratch": torch.empty(0, 10)}).values())
