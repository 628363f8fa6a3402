"""Logits, loss and every gradient against transformers' LLaMA on the same weights."""

from __future__ import annotations

import math

import pytest
import torch

from tests.harness import Outcome, build_model, forward_backward
from tests.reference import (
    Batch,
    Result,
    huggingface,
    plain,
    random_batch,
    random_weights,
    relative_error,
)
from tests.unit.model.shapes import CASES, SHAPES


def batch_of(shape, length, documents, seed=0):
    batch = random_batch(shape, 3, length, seed)
    return Batch(batch.tokens, batch.labels, documents)


def errors(ours: Outcome | Result, reference: Result) -> dict[str, float]:
    """The relative error of the loss, the logits and each gradient."""
    assert ours.grads.keys() == reference.grads.keys()
    named = {name: relative_error(ours.grads[name], g) for name, g in reference.grads.items()}
    named["loss"] = relative_error(ours.loss, reference.loss)
    named["logits"] = relative_error(ours.logits, reference.logits)
    return named


def assert_within(found: dict[str, float], tolerance: float) -> None:
    assert {name: error for name, error in found.items() if not error <= tolerance} == {}


def assert_shows_something(result: Result, length: int) -> None:
    """Every gradient is there, or an error in it would not show."""
    if length == 1:  # a single position attends to itself: its score has no gradient
        return
    assert [name for name, grad in result.grads.items() if not grad.norm() > 1e-6] == []


@pytest.mark.parametrize("length, documents", CASES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_fp64(shape, length, documents):
    weights, batch = random_weights(shape, length), batch_of(shape, length, documents)
    reference = huggingface.forward_backward(shape, weights, *batch[:2], torch.float64, documents)
    assert_shows_something(reference, length)
    ours = forward_backward(build_model(shape, weights, torch.float64), batch)
    found = errors(ours, reference)
    if length == 1:  # scores of one position: a gradient of exactly zero has no relative error
        scores = [name for name in found if name.endswith(("wq.weight", "wk.weight"))]
        assert all(ours.grads[name].norm() < 1e-14 for name in scores)
        found = {name: error for name, error in found.items() if name not in scores}
    assert_within(found, 1e-12)


@pytest.mark.parametrize("length, documents", CASES[1:], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_fp32(shape, length, documents):
    """transformers as it is: nothing in it is patched."""
    weights = random_weights(shape, length, torch.float32)
    batch = batch_of(shape, length, documents)
    reference = huggingface.forward_backward(shape, weights, *batch[:2], torch.float32, documents)
    ours = forward_backward(build_model(shape, weights, torch.float32), batch)
    assert ours.logits.dtype == torch.float32
    assert_within(errors(ours, reference), 1e-5)


BF16_SHAPES = ("grouped", "multi-head", "tied", "llama 3")
SEEDS = range(6)


@pytest.mark.parametrize("documents", [None, [[9, 24], [33], [1, 31, 1]]], ids=str)
@pytest.mark.parametrize("name", BF16_SHAPES)
def test_bf16_is_at_most_twice_as_far_from_fp64_as_transformers(name, documents):
    """All three start from the same bf16 weights, so only the arithmetic in between differs.

    Tensors are compared seed by seed. The loss is one number, whose error may by chance be near
    zero: its root mean square over the seeds is compared.
    """
    shape = SHAPES[name]
    squares = {"ours": 0.0, "theirs": 0.0}
    for seed in SEEDS:
        low = random_weights(shape, seed, torch.bfloat16)
        batch = batch_of(shape, 33, documents, seed)
        exact_weights = {key: weight.double() for key, weight in low.items()}
        exact = plain.forward_backward(shape, exact_weights, *batch[:2], torch.float64, documents)
        theirs = errors(
            huggingface.forward_backward(shape, low, *batch[:2], torch.bfloat16, documents), exact
        )
        outcome = forward_backward(build_model(shape, low, torch.bfloat16), batch)
        assert outcome.logits.dtype == torch.bfloat16
        assert outcome.loss.dtype == torch.float32
        assert {grad.dtype for grad in outcome.grads.values()} == {torch.float32}
        ours = errors(outcome, exact)
        squares["ours"] += ours.pop("loss") ** 2
        squares["theirs"] += theirs.pop("loss") ** 2
        assert {n: (e, theirs[n]) for n, e in ours.items() if not e <= 2 * theirs[n]} == {}
    assert math.sqrt(squares["ours"]) <= 2 * math.sqrt(squares["theirs"])


def test_the_comparison_can_fail():
    """A gradient off by a part in 10^11 shows, in the smallest tensor too."""
    shape = SHAPES["grouped"]
    weights, batch = random_weights(shape), batch_of(shape, 7, None)
    reference = huggingface.forward_backward(shape, weights, *batch[:2])
    ours = forward_backward(build_model(shape, weights, torch.float64), batch)
    ours.grads["norm.weight"][0] += 1e-11 * reference.grads["norm.weight"].norm()
    with pytest.raises(AssertionError, match=r"norm\.weight"):
        assert_within(errors(ours, reference), 1e-12)
