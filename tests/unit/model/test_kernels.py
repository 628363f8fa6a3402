"""The whole model's gradients with the kernels, against those by the plain PyTorch references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megallama.kernels import native
from tests.harness import build_model, forward_backward
from tests.reference import Batch, Shape, plain, random_batch, random_weights, relative_error

SHAPE = Shape(d_model=64, layers=3, ffn=176, vocab=301)


def gradients(dtype: torch.dtype, batch: Batch) -> dict[str, Tensor]:
    rounded = {name: w.to(dtype) for name, w in random_weights(SHAPE).items()}
    return forward_backward(build_model(SHAPE, rounded, dtype), batch).grads


@pytest.mark.parametrize(
    "documents", [None, [[20, 28], [48], [1, 47]]], ids=["samples", "documents"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_errors_are_at_most_twice_the_references(dtype, documents, monkeypatch):
    if "cpu" not in native.variants():
        pytest.skip("no kernels")
    batch = random_batch(SHAPE, 3, 48)._replace(document_lengths=documents)
    weights = {name: w.to(dtype).double() for name, w in random_weights(SHAPE).items()}
    truth = plain.forward_backward(
        SHAPE, weights, batch.tokens, batch.labels, document_lengths=documents
    ).grads
    ours = gradients(dtype, batch)
    again = gradients(dtype, batch)
    monkeypatch.setattr(native, "variants", dict)
    naive = gradients(dtype, batch)
    assert any(not torch.equal(ours[name], naive[name]) for name in truth), "kernels were used"
    for name, true in truth.items():
        assert torch.equal(ours[name], again[name]), f"{name} does not repeat"
        error, allowed = (relative_error(g[name], true) for g in (ours, naive))
        assert error <= 2 * allowed, f"{name}: {error:.2e}, naive {allowed:.2e}"
