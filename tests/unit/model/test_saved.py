"""What is kept for the backward: the same gradients under every policy, the declared bytes."""

from __future__ import annotations

import pytest
import torch

from megallama.autograd.passes import WgradQueue, drive
from megallama.autograd.stash import Stash
from megallama.model.chunk import EMBEDDING, HEAD
from megallama.spec.saved import POLICIES, WEIGHT_STATE, saved_bytes, weight_state_bytes
from tests.harness import build_model, flat, forward_backward, micro_batch, model_config, parts
from tests.reference import Batch, Shape, random_batch, random_weights

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
HEADS = {"multi-head": Shape(kv_heads=4), "grouped": Shape(), "multi-query": Shape(kv_heads=1)}
DOCUMENTS = {
    "whole samples": None,
    "even documents": [[9, 9], [9, 9]],
    "uneven": [[5, 13], [1, 16, 1]],
}
LENGTH, SAMPLES = 18, 2


@pytest.fixture(params=DOCUMENTS.values(), ids=DOCUMENTS.keys())
def batch(request):
    return Batch(*random_batch(Shape(), SAMPLES, LENGTH)[:2], request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", HEADS.values(), ids=HEADS.keys())
def test_policies(shape, dtype, batch):
    """Every policy gives the same bits, and holds exactly the bytes that `spec` declares."""
    weights, config = random_weights(shape), model_config(shape)
    reference = forward_backward(build_model(shape, weights, dtype, "all"), batch)
    for policy in POLICIES:
        outcome = forward_backward(build_model(shape, weights, dtype, policy), batch)
        declared = saved_bytes(config, policy, dtype.itemsize)
        assert outcome.saved_bytes == declared * shape.layers * SAMPLES * LENGTH, policy
        assert torch.equal(outcome.loss, reference.loss)
        for name, grad in reference.grads.items():
            assert torch.equal(outcome.grads[name], grad), (policy, name)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", HEADS.values(), ids=HEADS.keys())
def test_a_backward_in_two_parts(shape, dtype, policy, batch):
    """The same bits as in one; what is kept between the two are the bytes that `spec` declares."""
    weights, config = random_weights(shape), model_config(shape)
    reference = forward_backward(build_model(shape, weights, dtype, policy), batch)
    model = build_model(shape, weights, dtype, policy)
    chunk, ours, stash, state = model.chunks[0], micro_batch(model, *batch), Stash(), Stash()
    drive(chunk.forward(ours, None, stash))
    assert drive(chunk.backward(ours, None, stash, state)) is None
    assert len(stash) == 0
    assert all(state.peek(layer).keys() == WEIGHT_STATE for layer in range(shape.layers))
    state.take(EMBEDDING)
    declared = weight_state_bytes(config, dtype.itemsize) * shape.layers * SAMPLES * LENGTH
    assert state.bytes_held() == declared

    state = Stash()
    model, stash = build_model(shape, weights, dtype, policy), Stash()
    drive(model.chunks[0].forward(ours, None, stash))
    drive(model.chunks[0].backward(ours, None, stash, state))
    drive(model.chunks[0].backward_weights(ours, state))
    assert len(state) == 0
    for name, grad in parts(model.state, model.state.gradients).items():
        assert torch.equal(grad, reference.grads[name]), name


@pytest.mark.parametrize("policy", POLICIES)
def test_each_layer_s_set_is_let_go_when_its_backward_begins(policy):
    shape = Shape(layers=3)
    model = build_model(shape, random_weights(shape), torch.float32, policy)
    ours = micro_batch(model, *random_batch(shape, 1, 5))
    held, stash = [], Stash()
    take = stash.take
    stash.take = lambda key: (held.append((key, len(stash))), take(key))[1]
    drive(model.chunks[0].forward(ours, None, stash))
    assert len(stash) == 4
    queue = WgradQueue()
    drive(model.chunks[0].backward(ours, None, stash, queue), queue)
    assert held == [(HEAD, 4), (2, 3), (1, 2), (0, 1)]
    assert len(stash) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_evaluation_keeps_nothing_and_gives_the_same_losses(dtype, batch):
    shape = Shape()
    model = build_model(shape, random_weights(shape), dtype)
    ours, stash = micro_batch(model, *batch), Stash()
    trained = drive(model.chunks[0].forward(ours, None, stash))
    assert len(stash) == shape.layers + 1
    gradients = flat(model.state.gradients)
    evaluated = drive(model.chunks[0].forward(ours, None, None))
    assert torch.equal(evaluated, trained)
    assert torch.equal(flat(model.state.gradients), gradients), "evaluation touched a gradient"
    assert len(stash) == shape.layers + 1


def test_two_micro_batches_may_be_in_flight_in_two_stashes():
    """Nothing but the stash joins a forward to its backward."""
    shape = Shape()
    model = build_model(shape, random_weights(shape), torch.float64)
    first, second = random_batch(shape, 2, 7, seed=1), random_batch(shape, 2, 7, seed=2)
    expected = forward_backward(model, first, second)
    model.state.zero_gradients()
    flight = [(micro_batch(model, *b), Stash()) for b in (first, second)]
    losses = [drive(model.chunks[0].forward(pair[0], None, pair[1])) for pair in flight]
    for pair in flight:
        queue = WgradQueue()
        drive(model.chunks[0].backward(pair[0], None, pair[1], queue), queue)
    assert torch.equal(torch.stack([loss.sum() for loss in losses]).sum(), expected.loss)
    for name, grad in parts(model.state, model.state.gradients).items():
        assert torch.equal(grad, expected.grads[name]), name
