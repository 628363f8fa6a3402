"""The fused output projection and loss, in one chunk and in several that do not divide evenly, and
over vocabulary shards whose ranks are simulated in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megallama.autograd import cross_entropy
from megallama.autograd.cross_entropy import LinearCrossEntropy, VocabShard
from megallama.autograd.passes import Pass, drive
from megallama.dist.handle import Done
from megallama.spec.labels import IGNORE
from tests.unit.autograd.pairs import check_pair, random

T, D, V = 11, 5, 7
LABELS = torch.tensor([0, 6, IGNORE, 3, 3, IGNORE, IGNORE, 2, 1, 5, IGNORE])


def limit(patch: pytest.MonkeyPatch, tokens: int, width: int = V, itemsize: int = 8) -> None:
    """At most so many tokens' logits of this width at a time."""
    patch.setitem(cross_entropy.CHUNK_BYTES, "cpu", tokens * width * itemsize)


@pytest.fixture(params=[11, 4, 3, 1], ids=str)
def chunks(request, monkeypatch):
    limit(monkeypatch, request.param)
    return request.param


def whole() -> LinearCrossEntropy:
    """The op of a process that holds the vocabulary alone."""
    return LinearCrossEntropy(VocabShard(0, V, 1, lambda x: Done(x)))


def forward_backward(op, *arguments):
    """The losses and the gradient, with the last chunk's weight gradient added too."""
    losses, dx, wgrad = yield from op.forward_backward(*arguments)
    wgrad()
    return losses, dx


def reference(x, w, labels=LABELS):
    return torch.nn.functional.cross_entropy(x @ w.T, labels, ignore_index=IGNORE, reduction="none")


@pytest.mark.usefixtures("chunks")
def test_gradient():
    op = whole()

    def backward(dloss, x, w):
        dw = torch.zeros_like(w)
        _, dx = drive(forward_backward(op, x, w, LABELS, dw))
        return dx * dloss, dw * dloss

    def forward(x, w):
        return drive(op.forward(x, w, LABELS)).sum()

    check_pair(forward, backward, random(T, D), random(V, D))


def test_losses_against_torch(chunks, monkeypatch):
    """Both entries give the same losses; the buffers never outgrow a chunk."""
    lengths = []
    start = LinearCrossEntropy._start

    def recorded(self, x_cD, *arguments):
        lengths.append(len(x_cD))
        return start(self, x_cD, *arguments)

    monkeypatch.setattr(LinearCrossEntropy, "_start", recorded)
    op, x, w = whole(), random(T, D), random(V, D)
    losses = drive(op.forward(x, w, LABELS))
    assert sum(lengths) == T
    assert len(lengths) == -(-T // chunks)
    assert max(lengths) <= chunks
    assert torch.allclose(losses, reference(x, w), rtol=1e-13, atol=1e-14)
    assert not losses[LABELS == IGNORE].any()
    with_gradient, dx = drive(forward_backward(op, x, w, LABELS, torch.zeros_like(w)))
    assert torch.equal(with_gradient, losses)
    assert not dx[LABELS == IGNORE].any()
    assert [buffer.numel() <= chunks * V for buffer in op._buffers.values()] == [True]


def test_the_weight_gradient_is_added(chunks):
    x, w, held = random(T, D), random(V, D), random(V, D, seed=1)
    added, alone = held.clone(), torch.zeros_like(held)
    drive(forward_backward(whole(), x, w, LABELS, alone))
    drive(forward_backward(whole(), x, w, LABELS, added))
    assert torch.allclose(added, held + alone, rtol=1e-13, atol=1e-14)


def test_a_smaller_batch_after_a_larger_one():
    """Buffers grow and are then used in part."""
    op, w = whole(), random(V, D)
    for tokens in (3, T, 2, T):
        x = random(tokens, D)
        losses, _ = drive(forward_backward(op, x, w, LABELS[:tokens], torch.zeros_like(w)))
        assert torch.allclose(losses, reference(x, w, LABELS[:tokens]), rtol=1e-13, atol=1e-14)


def test_large_logits_do_not_overflow():
    x, w = 1e3 * random(T, D), random(V, D)
    losses, dx = drive(forward_backward(whole(), x, w, LABELS, torch.zeros_like(w)))
    assert torch.isfinite(dx).all()
    assert torch.allclose(losses, reference(x, w), rtol=1e-12, atol=1e-9)


def test_all_labels_ignored():
    x, w, dw = random(T, D), random(V, D), torch.zeros(V, D, dtype=torch.float64)
    labels = torch.full((T,), IGNORE)
    losses, dx = drive(forward_backward(whole(), x, w, labels, dw))
    assert not losses.any()
    assert not dx.any()
    assert not dw.any()


def test_bf16_losses_are_fp32():
    x, w = random(T, D).bfloat16(), random(V, D).bfloat16()
    dw = torch.zeros(V, D)
    losses, dx = drive(forward_backward(whole(), x, w, LABELS, dw))
    assert losses.dtype == torch.float32
    assert dx.dtype == torch.bfloat16
    exact = reference(x.double(), w.double())
    assert torch.allclose(losses.double(), exact, rtol=0.02, atol=0.02)


@dataclass
class Ranks:
    """The vocabulary's shards: what the ranks gather meets call by call, whenever it is asked for.

    A handle that is waited for before every rank has made the call is an error, as it would be a
    wait for ever.
    """

    count: int
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sent: list[list[Tensor]] = [[] for _ in range(self.count)]

    def gather(self, rank: int) -> Callable[[Tensor], Gathered]:
        def start(x: Tensor) -> Gathered:
            assert x.shape[0] == 1, "a row of each rank"
            self.sent[rank].append(x.clone())
            self.log.append(f"start {len(self.sent[rank]) - 1} of rank {rank}")
            return Gathered(self, len(self.sent[rank]) - 1, rank)

        return start

    def ops(self) -> list[LinearCrossEntropy]:
        return [
            LinearCrossEntropy(VocabShard(*self.rows(rank), self.count, self.gather(rank)))
            for rank in range(self.count)
        ]

    @property
    def height(self) -> int:
        return -(-V // self.count)

    def rows(self, rank: int) -> tuple[int, int]:
        """First row and rows: as many as there are of the rank's height, none where all are."""
        first = min(V, rank * self.height)
        return first, min(self.height, V - first)

    def split(self, w: Tensor) -> list[Tensor]:
        """Each rank's rows of w (V, D); padding is large, so that any use of it shows."""
        padded = torch.full((self.count * self.height, w.shape[1]), 50.0, dtype=w.dtype)
        padded[:V] = w
        return list(padded.split(self.height))


@dataclass
class Gathered:
    ranks: Ranks
    call: int
    rank: int
    cover: int = 1

    def wait(self) -> Tensor:
        self.ranks.log.append(f"wait {self.call} of rank {self.rank}")
        return torch.cat([sent[self.call] for sent in self.ranks.sent])


def in_lock_step(passes: Sequence[Pass[Any]]) -> list[Any]:
    """Every pass to its next wait, then the waits: as processes run whose collectives match."""
    values: list[Any] = [None] * len(passes)
    results: list[Any] = []
    while not results:
        handles = []
        for each, value in zip(passes, values, strict=True):
            try:
                handles.append(each.send(value))
            except StopIteration as end:
                results.append(end.value)
        assert not (results and handles), "one rank has ended before the others"
        values = [handle.wait() for handle in handles]
    assert len(results) == len(passes)
    return results


def sharded(
    ranks: Ranks, x: Tensor, w: Tensor, labels: Tensor, dw: Tensor | None = None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Every rank's losses, the sum of their parts of dx, and the gradient of w (V, D)."""
    shards = ranks.split(w)
    dws = [torch.zeros_like(shard) for shard in shards] if dw is None else ranks.split(dw)
    passes = [
        forward_backward(op, x, shard, labels, d)
        for op, shard, d in zip(ranks.ops(), shards, dws, strict=True)
    ]
    results = in_lock_step(passes)
    for rank, d in enumerate(dws):
        padding = d[ranks.rows(rank)[1] :]
        assert torch.equal(padding, torch.full_like(padding, 0.0 if dw is None else 50.0))
    return [loss for loss, _ in results], sum(dx for _, dx in results), torch.cat(dws)[:V]


def with_gradients(x: Tensor, w: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's losses, dx and dw."""
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    losses = reference(*leaves, labels)
    return losses.detach(), *torch.autograd.grad(losses.sum(), leaves)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("tokens", [11, 4, 3, 1])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 8])
def test_vocabulary_shards(monkeypatch, count, tokens):
    """Seven rows over five ranks are 2, 2, 2, 1 and none but padding; over eight the last has
    none."""
    ranks = Ranks(count)
    limit(monkeypatch, tokens, ranks.height)
    x, w = random(T, D), random(V, D)
    losses, dx, dw = sharded(ranks, x, w, LABELS)
    expected = with_gradients(x, w, LABELS)
    assert all(torch.equal(loss, losses[0]) for loss in losses), "the same bits on every rank"
    for ours, theirs in zip((losses[0], dx, dw), expected, strict=True):
        assert close(ours, theirs)
    assert not losses[0][LABELS == IGNORE].any()
    assert not dx[LABELS == IGNORE].any()
    assert [len(sent) for sent in ranks.sent] == [-(-T // tokens)] * count


@pytest.mark.parametrize("count", [2, 5, 8])
def test_a_shards_evaluation_is_its_training(monkeypatch, count):
    ranks, again = Ranks(count), Ranks(count)
    limit(monkeypatch, 4, ranks.height)
    x, w = random(T, D), random(V, D)
    losses, _, _ = sharded(ranks, x, w, LABELS)
    shards = zip(again.ops(), again.split(w), strict=True)
    evaluated = in_lock_step([op.forward(x, shard, LABELS) for op, shard in shards])
    assert all(torch.equal(loss, losses[0]) for loss in evaluated)


def test_a_shards_gradient_is_added(monkeypatch):
    limit(monkeypatch, 4, Ranks(3).height)
    x, w, held = random(T, D), random(V, D), random(V, D, seed=1)
    _, _, alone = sharded(Ranks(3), x, w, LABELS)
    _, _, added = sharded(Ranks(3), x, w, LABELS, held)
    assert close(added, held + alone)


def test_shards_of_ignored_labels_alone():
    x, w = random(T, D), random(V, D)
    losses, dx, dw = sharded(Ranks(5), x, w, torch.full((T,), IGNORE))
    assert not any(loss.any() for loss in losses)
    assert not dx.any()
    assert not dw.any()


def test_large_logits_of_one_shard_do_not_overflow():
    x, w = 1e3 * random(T, D), random(V, D)
    w[:4] *= 1e-3
    losses, dx, dw = sharded(Ranks(2), x, w, LABELS)
    expected = with_gradients(x, w, LABELS)
    assert torch.allclose(losses[0], expected[0], rtol=1e-12, atol=1e-9)
    assert torch.allclose(dx, expected[1], rtol=1e-9, atol=1e-9)
    assert torch.isfinite(dw).all()


@given(data=st.data(), count=st.integers(2, 9), tokens=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_any_shards_and_chunks(data, count, tokens, seed):
    total = data.draw(st.integers(1, 13))
    label = st.one_of(st.just(IGNORE), st.integers(0, V - 1))
    labels = torch.tensor(data.draw(st.lists(label, min_size=total, max_size=total)))
    x, w = random(total, D, seed=seed), random(V, D, seed=seed)
    ranks = Ranks(count)
    with pytest.MonkeyPatch.context() as patch:
        limit(patch, tokens, ranks.height)
        losses, dx, dw = sharded(ranks, x, w, labels)
    for ours, theirs in zip((losses[0], dx, dw), with_gradients(x, w, labels), strict=True):
        assert close(ours, theirs)


def test_the_statistics_travel_under_the_next_chunks_logits(monkeypatch):
    """A chunk is waited for once the next one's logits are there, in buffers of its own."""
    ranks = Ranks(2)
    limit(monkeypatch, 4, ranks.height)
    sharded(ranks, random(T, D), random(V, D), LABELS)
    of_rank_0 = [entry.removesuffix(" of rank 0") for entry in ranks.log if "rank 0" in entry]
    assert of_rank_0 == ["start 0", "start 1", "wait 0", "start 2", "wait 1", "wait 2"]


def test_bf16_shards_agree_to_the_bit_among_themselves(monkeypatch):
    ranks = Ranks(3)
    limit(monkeypatch, 4, ranks.height, itemsize=2)
    x, w = random(T, D).bfloat16(), random(V, D).bfloat16()
    shards = ranks.split(w)
    passes = [
        forward_backward(op, x, shard, LABELS, torch.zeros(shard.shape))
        for op, shard in zip(ranks.ops(), shards, strict=True)
    ]
    results = in_lock_step(passes)
    assert all(torch.equal(loss, results[0][0]) for loss, _ in results)
    assert results[0][0].dtype == torch.float32
    exact = reference(x.double(), w.double())
    assert torch.allclose(results[0][0].double(), exact, rtol=0.02, atol=0.02)
