"""One optimizer step: how a batch is cut, and the steps that are left out."""

from __future__ import annotations

import math

import pytest
import torch

from megallama.spec.labels import IGNORE
from tests.harness import flat, parts
from tests.reference import Batch, Shape, plain, random_batch, random_weights, relative_error
from tests.unit.optim.trainers import build_step, optimizer_config, step_batch

SHAPE = Shape()
LENGTH = 9


def uneven_batch():
    """Four samples with 9, 4, 0 and 1 valid tokens."""
    tokens, labels, _ = random_batch(SHAPE, 4, LENGTH, ignored=0.0)
    for sample, valid in enumerate((9, 4, 0, 1)):
        labels[sample, valid:] = IGNORE
    return Batch(tokens, labels)


def snapshot(step):
    """Everything that a step left out must leave as it was."""
    state, optimizer = step.model.state, step.optimizer
    held = [*state.masters.values(), *state.weights.values()]
    held += [*optimizer.exp_avg.values(), *optimizer.exp_avg_sq.values()]
    return [t.clone() for t in held], optimizer.updates


def kept_update(step):
    """Replaces the optimizer's update by keeping the gradients and the divisor it was given."""
    kept = {}

    def keep(lr, divisor):
        state = step.model.state
        kept.update({name: g / divisor for name, g in state.gradients.items()})

    step.optimizer.step = keep
    return kept


def assert_unchanged(step, before):
    tensors, updates = snapshot(step)
    assert updates == before[1]
    assert all(torch.equal(a, b) for a, b in zip(tensors, before[0], strict=True))


@pytest.mark.parametrize("documents", [None, [[9], [4, 5], [1, 8], [3, 3, 3]]], ids=str)
def test_however_the_batch_is_cut(documents):
    batch = Batch(*uneven_batch()[:2], documents)
    weights = random_weights(SHAPE)
    expected = plain.forward_backward(
        SHAPE, weights, *batch[:2], document_lengths=documents, reduction="mean"
    )
    results = []
    for micro_batch in (1, 2, 4):
        step = build_step(SHAPE, weights, micro_batch, optimizer_config(grad_clip=None))
        mean = kept_update(step)
        result = step.run(step_batch(batch), lr=0.0)
        assert result.loss == pytest.approx(expected.loss.item(), rel=1e-13)
        assert (result.tokens, result.valid_tokens) == (36, 14)
        for name, grad in parts(step.model.state, mean).items():
            assert relative_error(grad, expected.grads[name]) < 1e-12, name
        norm = math.sqrt(sum(g.square().sum().item() for g in expected.grads.values()))
        assert result.grad_norm == pytest.approx(norm, rel=1e-12)
        results.append(result)
    assert all(r.loss == pytest.approx(results[0].loss, rel=1e-13) for r in results)


def test_a_batch_that_micro_batches_do_not_divide_is_a_bug():
    step = build_step(SHAPE, random_weights(SHAPE), 3)
    with pytest.raises(ValueError, match="4 samples in micro-batches of 3"):
        step.run(step_batch(uneven_batch()), lr=0.0)


def test_masters_are_wider_than_bf16_weights():
    """A change below bf16's resolution stays in the masters, and adds up there."""
    step = build_step(SHAPE, random_weights(SHAPE), 2, dtype=torch.bfloat16)
    state = step.model.state
    start = flat(state.masters)
    for _ in range(3):
        assert step.run(step_batch(uneven_batch()), lr=1e-6).applied
        assert torch.equal(flat(state.weights), flat(state.masters).bfloat16())
    assert flat(state.masters).dtype == torch.float32
    moved = (flat(state.masters) != start).float().mean()
    rounded = (flat(state.weights) != start.bfloat16()).float().mean()
    assert moved > 0.5
    assert rounded < 0.1 * moved


def test_a_batch_without_a_valid_token_changes_nothing():
    step = build_step(SHAPE, random_weights(SHAPE), 2)
    assert step.run(step_batch(uneven_batch()), lr=1e-3).applied
    before = snapshot(step)
    tokens, labels, _ = uneven_batch()
    result = step.run(step_batch(Batch(tokens, torch.full_like(labels, IGNORE))), lr=1e-3)
    assert not result.applied
    assert result.fault is None
    assert result.valid_tokens == 0
    assert math.isnan(result.loss)
    assert math.isnan(result.grad_norm)
    assert_unchanged(step, before)
    assert step.run(step_batch(uneven_batch()), lr=1e-3).applied


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_non_finite_weight_stops_the_update(dtype, bad):
    step = build_step(SHAPE, random_weights(SHAPE), 2, dtype=dtype)
    state = step.model.state
    with step.zero.changing_masters():
        state.masters["layers.1.wo"][3, 4] = bad
    before = [t.nan_to_num() for t in snapshot(step)[0]]
    result = step.run(step_batch(uneven_batch()), lr=1e-3)
    assert not result.applied
    assert result.fault == "loss is nan"
    assert step.optimizer.updates == 0
    after = [t.nan_to_num() for t in snapshot(step)[0]]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_non_finite_gradient_is_named_and_forgotten(monkeypatch):
    step = build_step(SHAPE, random_weights(SHAPE), 2, dtype=torch.float32)
    finish = step.zero.finish_gradients

    def spoiled() -> None:
        finish()
        step.model.state.gradients["layers.1.w2"][2, 3] = math.inf

    before = snapshot(step)
    with monkeypatch.context() as patch:
        patch.setattr(step.zero, "finish_gradients", spoiled)
        result = step.run(step_batch(uneven_batch()), lr=1e-3)
    assert math.isfinite(result.loss)
    assert result.fault == "the gradient of layers.1.w2 is not finite"
    assert not result.applied
    assert_unchanged(step, before)
    # The next step starts from clean buffers.
    result = step.run(step_batch(uneven_batch()), lr=1e-3)
    assert result.applied
    assert math.isfinite(result.grad_norm)


def test_layer_norms_and_source_losses():
    step = build_step(SHAPE, random_weights(SHAPE), 2, optimizer_config(grad_clip=None))
    mean = kept_update(step)
    batch = step_batch(uneven_batch())
    batch.sources_N[:] = [2, 0, 1, 0]
    result = step.run(batch, lr=0.0, layer_norms=True)
    assert result.source_losses.keys() == {0, 2}, "source 1 has no valid token"
    total = 5 * result.source_losses[0] + 9 * result.source_losses[2]
    assert result.loss == pytest.approx(total / 14, rel=1e-13)
    state = step.model.state
    for layer in range(SHAPE.layers):
        grads = [mean[s.name] for s in state.table if s.parameter.layer == layer]
        norm = math.sqrt(sum(g.square().sum().item() for g in grads))
        assert result.layer_norms.gradient[layer] == pytest.approx(norm, rel=1e-12)
    embedded = state.weights["tok_embeddings"][torch.from_numpy(batch.tokens_NS)]
    rms = embedded.square().mean().sqrt().item()
    assert result.layer_norms.activation[0] == pytest.approx(rms, rel=1e-12)
    assert step.run(batch, lr=0.0).layer_norms is None


@pytest.mark.parametrize("clip, clipped", [(1e-3, True), (0.0, False), (None, False), (1e9, False)])
def test_clipping(clip, clipped):
    """AdamW's first moment after one update is (1 - β₁) times the gradient that it was given."""
    step = build_step(SHAPE, random_weights(SHAPE), 2, optimizer_config(grad_clip=clip))
    result = step.run(step_batch(uneven_batch()), lr=0.0)
    seen = math.sqrt(sum(m.square().sum().item() for m in step.optimizer.exp_avg.values())) / 0.1
    expected = 1e-3 if clipped else result.grad_norm
    assert result.grad_norm > 1e-2, "the norm is that before clipping"
    assert seen == pytest.approx(expected, rel=2e-4 if clipped else 1e-12)
