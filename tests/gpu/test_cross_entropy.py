"""The cross-entropy on a GPU: the bodies of tests/unit on another `device`, and LLaMA's shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from megallama.kernels import cross_entropy
from megallama.kernels.cross_entropy import (
    cross_entropy_,
    cross_entropy_gradient_,
    cross_entropy_statistics,
)
from tests.gpu.large import (
    LLAMA,
    TOKENS,
    Large,
    assert_as_good,
    every_offset,
    every_width,
    needs_memory,
)
from tests.unit.kernels.test_cross_entropy import *  # noqa: F403
from tests.unit.kernels.test_cross_entropy import some_labels


def truth(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(leaf, labels, reduction="none")
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


@every_offset
@every_width
def test_llama_s_vocabularies(device, width, offset):
    """Whole, and as two shards; the truth is taken of 512 of the tokens."""
    large, vocab = Large(device, offset), LLAMA[width][1]
    logits = large(TOKENS, vocab, scale=3.0)
    labels = some_labels(TOKENS, vocab, device)
    some = torch.arange(0, TOKENS, 16, device=device)
    true_loss, true_gradient = truth(logits[some], labels[some])
    naive, half = logits[some].clone(), vocab // 2
    naive_loss = torch.empty(len(some), device=device)
    cross_entropy._fused_reference(naive, labels[some], vocab, naive_loss, naive)
    places = [(0, half), (half, vocab - half)]
    shards = [large.empty(TOKENS, rows) for _, rows in places]
    found = []
    for shard, (first, rows) in zip(shards, places, strict=True):
        shard.copy_(logits[:, first : first + rows])
        found.append(cross_entropy_statistics(shard, labels, first, rows))
    log_sums, targets = torch.stack(found).unbind(1)
    lse = log_sums.logsumexp(0)
    for shard, place in zip(shards, places, strict=True):
        cross_entropy_gradient_(shard, labels, lse, *place)
    loss = cross_entropy_(logits, labels, vocab)
    assert_as_good(loss[some], naive_loss, true_loss.clone())
    assert_as_good((lse - targets.sum(0)).where(labels >= 0, 0.0)[some], naive_loss, true_loss)
    assert_as_good(torch.cat(shards, 1)[some], naive, true_gradient.clone())
    assert_as_good(logits[some], naive, true_gradient)
    assert not logits.isnan().any()


def test_more_logits_than_32_bits_count(device):
    tokens, vocab = 17000, 128256
    needs_memory(device, 6)
    large = Large(device)
    logits = large.empty(tokens, vocab)
    logits[:-4], logits[-4:] = 0, large(4, vocab)
    labels = torch.arange(tokens, device=device)
    last = logits[-4:].clone()
    losses = cross_entropy_(logits, labels, vocab)
    expected = cross_entropy_(last, labels[-4:], vocab)
    assert torch.equal(losses[-4:], expected)
    assert torch.equal(logits[-4:], last)
