"""The references against each other, in fp64, and against closed forms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import (
    IGNORED,
    Batch,
    Result,
    Shape,
    document_positions,
    huggingface,
    parameter_shapes,
    plain,
    random_batch,
    random_weights,
    relative_error,
)

TOLERANCE = 1e-13
# With heads of 8, of the four pairs one is kept, one is interpolated and two are slowed down.
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_context": 128}

SHAPES = {
    "grouped": Shape(),
    "multi-head": Shape(kv_heads=4),
    "one key head": Shape(kv_heads=1),
    "tied": Shape(tie_embeddings=True),
    "tied multi-head": Shape(kv_heads=4, tie_embeddings=True),
    "scaled rope": Shape(rope_scaling=SCALING),
    "llama 3": Shape(rope_theta=500_000.0, rope_scaling=SCALING),
    "large epsilon": Shape(norm_eps=0.1),
    "heads of 12": Shape(d_model=36, heads=3, kv_heads=3),
}
DOCUMENTS = {
    7: [None, [[7], [3, 4], [1, 1, 5]]],
    13: [None, [[4, 9], [1, 11, 1], [5, 5, 3]]],
}


def assert_same(ours: Result, reference: Result, tolerance: float = TOLERANCE) -> None:
    errors = {"loss": relative_error(ours.loss, reference.loss)}
    errors["logits"] = relative_error(ours.logits, reference.logits)
    assert ours.grads.keys() == reference.grads.keys()
    for name, grad in reference.grads.items():
        assert grad.norm() > 0, f"the gradient of {name} is zero: it would show nothing"
        errors[name] = relative_error(ours.grads[name], grad)
    assert {name: e for name, e in errors.items() if not e <= tolerance} == {}


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "length, documents", [(s, d) for s in (7, 13) for d in DOCUMENTS[s]], ids=str
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_plain_is_huggingface(shape, length, documents, attn):
    weights = random_weights(shape, seed=length)
    batch = random_batch(shape, 3, length, seed=length)
    arguments = (shape, weights, batch.tokens, batch.labels, torch.float64, documents)
    assert_same(
        plain.forward_backward(*arguments), huggingface.forward_backward(*arguments, attn=attn)
    )


def test_one_token_and_the_mean_over_valid_tokens():
    # A document of one position attends to itself alone: queries and keys have no gradient.
    shape, tokens, labels = Shape(), torch.tensor([[5], [9]]), torch.tensor([[3], [IGNORED]])
    weights = random_weights(shape)
    for reference in (plain, huggingface):
        result = reference.forward_backward(shape, weights, tokens, labels, reduction="mean")
        logits = result.logits[0, 0]
        assert relative_error(result.loss, logits.logsumexp(0) - logits[3]) < TOLERANCE
        assert result.grads["layers.0.attention.wq.weight"].norm() < TOLERANCE
    batch = random_batch(shape, 2, 7)
    total, mean = (
        plain.forward_backward(shape, weights, batch.tokens, batch.labels, reduction=r)
        for r in ("sum", "mean")
    )
    valid = (batch.labels != IGNORED).sum()
    assert 0 < valid < batch.labels.numel()
    assert relative_error(mean.loss, total.loss / valid) < TOLERANCE
    for name, grad in total.grads.items():
        assert relative_error(mean.grads[name], grad / valid) < TOLERANCE


@pytest.mark.parametrize("attn", ["plain", "eager", "sdpa"])
def test_masked_documents_are_documents_alone(attn):
    shape, lengths = Shape(), [4, 1, 8]
    weights, batch = random_weights(shape), random_batch(shape, 1, 13)

    def logits(tokens, documents=None):
        labels = torch.zeros_like(tokens)
        arguments = (shape, weights, tokens, labels, torch.float64, documents)
        if attn == "plain":
            return plain.forward_backward(*arguments).logits
        return huggingface.forward_backward(*arguments, attn=attn).logits

    alone = torch.cat([logits(part) for part in batch.tokens.split(lengths, dim=1)], dim=1)
    assert relative_error(logits(batch.tokens, [lengths]), alone) < TOLERANCE
    assert relative_error(logits(batch.tokens), alone) > 0.1


def test_our_document_mask_is_the_one_that_transformers_infers():
    """transformers infers documents from restarting positions, but with a cache it does not."""
    shape, lengths = Shape(), [[4, 9], [7, 6]]
    weights, batch = random_weights(shape), random_batch(shape, 2, 13)
    ours = plain.forward(shape, weights, batch.tokens, lengths)
    _, positions = document_positions(lengths, 13)
    with huggingface.lift_fp32_islands(), torch.no_grad():
        model = huggingface.build(shape, weights)
        inferred = model(input_ids=batch.tokens, position_ids=positions).logits
        cached = model(input_ids=batch.tokens, position_ids=positions, use_cache=True).logits
    assert relative_error(inferred, ours) < TOLERANCE
    assert relative_error(cached, ours) > 0.1


def test_rope_scaling_is_read_from_an_object_or_a_dict_and_matters():
    scaled = Shape(rope_scaling=SCALING)
    other = dataclasses.replace(scaled, rope_scaling=SimpleNamespace(**SCALING))
    omega = plain.frequencies(Shape())
    ratio = plain.frequencies(scaled) / omega
    assert torch.equal(plain.frequencies(other), plain.frequencies(scaled))
    assert ratio[0] == 1
    assert 1 / 8 < ratio[1] < 1
    assert torch.allclose(ratio[2:], torch.tensor(1 / 8, dtype=torch.float64), rtol=1e-15)


class _Dtypes(TorchDispatchMode):
    """The floating dtypes that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.seen.add(value.dtype)
        return out


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("shape", [Shape(), Shape(rope_scaling=SCALING)], ids=["plain", "scaled"])
def test_no_fp32_island_is_left(shape, attn):
    weights, batch = random_weights(shape), random_batch(shape, 2, 7)
    with _Dtypes() as dtypes:
        huggingface.forward_backward(shape, weights, batch.tokens, batch.labels, attn=attn)
    assert dtypes.seen == {torch.float64}
    with _Dtypes() as dtypes:
        model = huggingface.build(shape, weights, attn=attn)
        model(input_ids=batch.tokens).logits.sum().backward()
    assert torch.float32 in dtypes.seen


def test_the_lift_is_needed_and_undone():
    shape = Shape()
    weights, batch = random_weights(shape), random_batch(shape, 2, 13)
    expected = plain.forward(shape, weights, batch.tokens)

    def error() -> float:
        model = huggingface.build(shape, weights)
        return relative_error(model(input_ids=batch.tokens).logits, expected)

    before = error()
    assert before > 1e-9
    with huggingface.lift_fp32_islands():
        assert error() < TOLERANCE
    with pytest.raises(ZeroDivisionError), huggingface.lift_fp32_islands():
        _ = 1 / 0
    assert error() == before
    assert torch.get_default_dtype() == torch.float32
    assert torch.arange(3).float().dtype == torch.float32
    assert torch.zeros(1, dtype=torch.float64).to(torch.float32).dtype == torch.float32


def test_the_lift_is_needed_when_the_model_is_built_too():
    """Frequencies are rounded to fp32 at construction; the forward alone cannot repair them."""
    shape = Shape(d_model=48)  # heads of 12: no frequency is a power of ten
    weights, batch = random_weights(shape), random_batch(shape, 2, 13)
    model = huggingface.build(shape, weights)
    with huggingface.lift_fp32_islands():
        late = model(input_ids=batch.tokens).logits
    assert relative_error(late, plain.forward(shape, weights, batch.tokens)) > 1e-9


def test_low_precision_keeps_the_islands_and_its_rounding():
    """bf16 keeps fp32 frequencies; fp32 and bf16 lie about their epsilon from fp64."""
    shape = Shape()
    weights, batch = random_weights(shape), random_batch(shape, 2, 13)
    model = huggingface.build(shape, weights, torch.bfloat16)
    frequencies = model.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    assert relative_error(frequencies, plain.frequencies(shape)) < 1e-7
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    arguments = (shape, weights, batch.tokens, batch.labels)
    exact = plain.forward_backward(*arguments)
    for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 0.1)):
        for reference in (plain, huggingface):
            result = reference.forward_backward(*arguments, dtype=dtype)
            assert result.logits.dtype == dtype
            assert all(grad.dtype == dtype for grad in result.grads.values())
            assert_same(result, exact, bound)


@pytest.mark.parametrize("tied", [False, True])
def test_build_takes_exactly_the_weights_and_touches_no_random_state(tied):
    shape = Shape(tie_embeddings=tied)
    weights = random_weights(shape)
    state = torch.get_rng_state()
    model = huggingface.build(shape, weights)
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    names = {huggingface.huggingface_name(name) for name in weights}
    assert {name for name, _ in model.named_parameters()} == names
    for name, weight in weights.items():
        held = model.get_parameter(huggingface.huggingface_name(name))
        assert torch.equal(held, weight)
        assert held.data_ptr() != weight.data_ptr()
    del weights["norm.weight"]
    with pytest.raises(RuntimeError, match=r"model\.norm\.weight"):
        huggingface.build(shape, weights)


def _adamw_by_hand(
    shape: Shape,
    start: dict[str, torch.Tensor],
    gradient: Callable[[dict[str, torch.Tensor], int], Result],
    steps: int,
    settings: huggingface.AdamW,
) -> huggingface.Training:
    """Loshchilov and Hutter 2019, algorithm 2, its decay scaled by the learning rate."""
    weights = {name: w.clone() for name, w in start.items()}
    first = {name: torch.zeros_like(w) for name, w in start.items()}
    second = {name: torch.zeros_like(w) for name, w in start.items()}
    losses, norms = [], []
    beta1, beta2 = settings.betas
    for step in range(steps):
        loss, _, grads = gradient(weights, step)
        losses.append(loss.item())
        norms.append(math.sqrt(sum(g.square().sum().item() for g in grads.values())))
        factor = 1.0 if settings.clip is None else min(1.0, settings.clip / (norms[-1] + 1e-6))
        for name, w in weights.items():
            g = grads[name] * factor
            first[name] = beta1 * first[name] + (1 - beta1) * g
            second[name] = beta2 * second[name] + (1 - beta2) * g * g
            m = first[name] / (1 - beta1 ** (step + 1))
            v = second[name] / (1 - beta2 ** (step + 1))
            decay = settings.weight_decay * w if len(parameter_shapes(shape)[name]) == 2 else 0
            weights[name] = w - settings.lr(step) * (m / (v.sqrt() + settings.eps) + decay)
    return huggingface.Training(losses, norms, weights)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("tied", [False, True])
def test_adamw_loop_is_adamw(tied, clip):
    shape = Shape(tie_embeddings=tied)
    weights = random_weights(shape)
    batches = [random_batch(shape, 2, 7, seed=s) for s in range(2)]
    batches.append(Batch(*random_batch(shape, 2, 7, seed=2)[:2], [[3, 4], [7]]))
    settings = huggingface.AdamW(lambda step: 3e-3 * (step + 1), clip=clip)

    def gradient(now: dict[str, torch.Tensor], step: int) -> Result:
        tokens, labels, documents = batches[step % 3]
        return plain.forward_backward(
            shape, now, tokens, labels, document_lengths=documents, reduction="mean"
        )

    ours = huggingface.adamw_loop(shape, weights, batches, 5, settings)
    expected = _adamw_by_hand(shape, weights, gradient, 5, settings)
    assert ours.losses == pytest.approx(expected.losses, rel=1e-12)
    assert ours.grad_norms == pytest.approx(expected.grad_norms, rel=1e-12)
    assert all(norm > 0.5 for norm in ours.grad_norms)
    assert ours.weights.keys() == weights.keys()
    for name, weight in expected.weights.items():
        assert relative_error(ours.weights[name], weight) < 1e-12
        assert relative_error(weights[name], weight) > 1e-3


def test_adamw_loop_refuses_a_batch_without_a_target():
    shape = Shape()
    batch = random_batch(shape, 1, 7, ignored=1.1)
    with pytest.raises(ValueError, match="no valid token"):
        huggingface.adamw_loop(
            shape, random_weights(shape), [batch], 1, huggingface.AdamW(lambda step: 1e-3)
        )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_random_weights_make_logits_of_order_one(shape):
    weights, batch = random_weights(shape), random_batch(shape, 4, 13)
    assert {name: tuple(w.shape) for name, w in weights.items()} == parameter_shapes(shape)
    assert 0.3 < plain.forward(shape, weights, batch.tokens).std() < 3


def test_random_weights_depend_on_the_seed_and_the_name_alone():
    small, large = random_weights(Shape(layers=1)), random_weights(Shape(layers=3))
    assert all(torch.equal(w, large[name]) for name, w in small.items())
    low = random_weights(Shape(layers=1), dtype=torch.bfloat16)
    assert all(torch.equal(w.bfloat16(), low[name]) for name, w in small.items())
    other = random_weights(Shape(layers=1), seed=1)
    assert not any(torch.equal(w, other[name]) for name, w in small.items())


def test_relative_error():
    a = torch.tensor([3.0, 4.0])
    assert relative_error(a, a) == 0
    assert relative_error(2 * a, a) == 1
    assert relative_error(a, torch.zeros(2)) == 5
    assert math.isnan(relative_error(a * math.nan, a))
    with pytest.raises(ValueError, match="shapes differ"):
        relative_error(a, a[:1])


def test_document_lengths_must_fill_the_sample():
    with pytest.raises(ValueError, match="add up to 7"):
        document_positions([[3, 3]], 7)
