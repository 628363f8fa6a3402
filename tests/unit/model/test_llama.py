"""The model around its layers: positions, logits, tied weights."""

from __future__ import annotations

import torch

from megallama.autograd.passes import drive
from tests.harness import build_model, forward_backward, micro_batch
from tests.reference import Batch, Shape, random_batch, random_weights


def test_positions_start_anew_in_each_document():
    model = build_model(Shape(), random_weights(Shape()), torch.float64)
    positions = model.positions([[3, 1], [2, 2]])
    assert positions.segments.lengths == (3, 1, 2, 2)
    expected = torch.tensor([0, 1, 2, 0, 0, 1, 0, 1], dtype=torch.float64)
    assert torch.allclose(positions.rotation.cos[:, 0, 0], expected.cos(), rtol=1e-15)


def test_a_token_sees_no_later_one_and_no_other_sample_or_document():
    shape = Shape()
    model = build_model(shape, random_weights(shape), torch.float64)
    tokens, labels, _ = random_batch(shape, 2, 6)
    lengths = [[4, 2], [6]]

    def logits(tokens):
        ours = micro_batch(model, tokens, labels, lengths)
        return drive(model.logits(ours.tokens_T, ours.positions)).view(2, 6, -1)

    changed = tokens.clone()
    changed[0, 2] = (changed[0, 2] + 1) % shape.vocab
    same = (logits(changed) == logits(tokens)).all(-1)
    assert same.tolist() == [[True, True, False, False, True, True], [True] * 6]


def test_losses_are_per_token_and_zero_where_ignored():
    shape = Shape()
    model = build_model(shape, random_weights(shape), torch.float64)
    batch = random_batch(shape, 2, 6)
    ours = micro_batch(model, *batch)
    losses = drive(model.chunks[0].forward(ours, None, None))
    assert losses.shape == (12,)
    assert torch.equal(losses == 0, ours.labels_T == -100)


def test_tied_weights_have_two_gradient_buffers_and_one_weight():
    """The sum of the two is the gradient of the untied model's embedding and output together."""
    tied, untied = Shape(tie_embeddings=True), Shape()
    weights = random_weights(tied)
    batch = random_batch(tied, 2, 6)
    model = build_model(tied, weights, torch.float64)
    assert model.state.weights["output"] is model.state.weights["tok_embeddings"]
    ours = forward_backward(model, batch)
    apart = weights | {"output.weight": weights["tok_embeddings.weight"]}
    theirs = forward_backward(build_model(untied, apart, torch.float64), batch)
    assert torch.equal(ours.loss, theirs.loss)
    both = theirs.grads["tok_embeddings.weight"] + theirs.grads["output.weight"]
    assert torch.equal(ours.grads["tok_embeddings.weight"], both)


def test_the_same_bits_again():
    shape = Shape()
    batch = Batch(*random_batch(shape, 2, 6)[:2], [[6], [1, 5]])
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model(shape, random_weights(shape), dtype)
        first, second = forward_backward(model, batch), forward_backward(model, batch)
        assert torch.equal(first.loss, second.loss)
        assert all(torch.equal(grad, second.grads[name]) for name, grad in first.grads.items())
