"""The fused output projection and loss, in one chunk and in several that do not divide evenly."""

from __future__ import annotations

import pytest
import torch

from megallama.autograd import cross_entropy
from megallama.autograd.cross_entropy import LinearCrossEntropy
from megallama.spec.labels import IGNORE
from tests.unit.autograd.pairs import check_pair, random

T, D, V = 11, 5, 7
LABELS = torch.tensor([0, 6, IGNORE, 3, 3, IGNORE, IGNORE, 2, 1, 5, IGNORE])


@pytest.fixture(params=[(11, 11), (4, 11), (4, 3), (1, 1), (3, 2)], ids=str)
def chunks(request, monkeypatch):
    """At most so many tokens' logits, and so many rows of a softmax, at a time."""
    tokens, rows = request.param
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", tokens * V * 8)
    monkeypatch.setattr(cross_entropy, "SOFTMAX_BYTES", {"cpu": rows * V * 4})
    return tokens


def reference(x, w, labels=LABELS):
    return torch.nn.functional.cross_entropy(x @ w.T, labels, ignore_index=IGNORE, reduction="none")


@pytest.mark.usefixtures("chunks")
def test_gradient():
    op = LinearCrossEntropy()

    def backward(dloss, x, w):
        dw = torch.zeros_like(w)
        _, dx = op.forward_backward(x, w, LABELS, dw)
        return dx * dloss, dw * dloss

    check_pair(lambda x, w: op.forward(x, w, LABELS).sum(), backward, random(T, D), random(V, D))


def test_losses_against_torch(chunks, monkeypatch):
    """Both entries give the same losses; the buffers never outgrow a chunk."""
    lengths = []
    logits = LinearCrossEntropy._logits

    def recorded(self, x_cD, w_VD):
        lengths.append(len(x_cD))
        return logits(self, x_cD, w_VD)

    monkeypatch.setattr(LinearCrossEntropy, "_logits", recorded)
    op, x, w = LinearCrossEntropy(), random(T, D), random(V, D)
    losses = op.forward(x, w, LABELS)
    assert sum(lengths) == T
    assert len(lengths) == -(-T // chunks)
    assert max(lengths) <= chunks
    assert torch.allclose(losses, reference(x, w), rtol=1e-13, atol=1e-14)
    assert not losses[LABELS == IGNORE].any()
    with_gradient, dx = op.forward_backward(x, w, LABELS, torch.zeros_like(w))
    assert torch.equal(with_gradient, losses)
    assert not dx[LABELS == IGNORE].any()


def test_the_weight_gradient_is_added(chunks):
    x, w, held = random(T, D), random(V, D), random(V, D, seed=1)
    added, alone = held.clone(), torch.zeros_like(held)
    LinearCrossEntropy().forward_backward(x, w, LABELS, alone)
    LinearCrossEntropy().forward_backward(x, w, LABELS, added)
    assert torch.allclose(added, held + alone, rtol=1e-13, atol=1e-14)


def test_a_smaller_batch_after_a_larger_one():
    """Buffers grow and are then used in part."""
    op, w = LinearCrossEntropy(), random(V, D)
    for tokens in (3, T, 2, T):
        x = random(tokens, D)
        losses, _ = op.forward_backward(x, w, LABELS[:tokens], torch.zeros_like(w))
        assert torch.allclose(losses, reference(x, w, LABELS[:tokens]), rtol=1e-13, atol=1e-14)


def test_large_logits_do_not_overflow():
    x, w = 1e3 * random(T, D), random(V, D)
    losses, dx = LinearCrossEntropy().forward_backward(x, w, LABELS, torch.zeros_like(w))
    assert torch.isfinite(dx).all()
    assert torch.allclose(losses, reference(x, w), rtol=1e-12, atol=1e-9)


def test_all_labels_ignored():
    x, w, dw = random(T, D), random(V, D), torch.zeros(V, D, dtype=torch.float64)
    labels = torch.full((T,), IGNORE)
    losses, dx = LinearCrossEntropy().forward_backward(x, w, labels, dw)
    assert not losses.any()
    assert not dx.any()
    assert not dw.any()


def test_bf16_losses_are_fp32():
    x, w = random(T, D).bfloat16(), random(V, D).bfloat16()
    dw = torch.zeros(V, D)
    losses, dx = LinearCrossEntropy().forward_backward(x, w, LABELS, dw)
    assert losses.dtype == torch.float32
    assert dx.dtype == torch.bfloat16
    exact = reference(x.double(), w.double())
    assert torch.allclose(losses.double(), exact, rtol=0.02, atol=0.02)
