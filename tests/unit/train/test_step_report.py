"""What a step reports of itself, against the gradients that it leaves and plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from megallama.autograd.passes import drive
from megallama.data.dataset import Batch
from megallama.spec.labels import IGNORE
from megallama.train.build import Trainer, build_dataset, build_trainer
from megallama.train.passes import Samples
from tests.conftest import MakeConfig
from tests.harness import flat, parts
from tests.reference import plain

FP64 = {"train.precision": "fp64", "optimizer.grad_clip": 1.0}


def batch_and_trainer(make_config: MakeConfig, changes: dict[str, Any]) -> tuple[Batch, Trainer]:
    config = make_config({**FP64, **changes})
    return build_dataset(config).batch(0, 4), build_trainer(config)


def reference(trainer: Trainer, batch: Batch) -> Any:
    state = trainer.model.state
    weights = {name: t.clone() for name, t in parts(state, state.masters).items()}
    return plain.forward_backward(
        trainer.config.model,
        weights,
        torch.from_numpy(batch.tokens_NS),
        torch.from_numpy(batch.labels_NS),
        document_lengths=batch.document_lengths,
    )


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_norms_and_sources_are_those_of_the_gradients(
    make_config: MakeConfig, micro_batch: int, masked: bool
) -> None:
    changes = {"train.micro_batch": micro_batch, "data.mask_documents": masked}
    batch, trainer = batch_and_trainer(make_config, changes)
    expected = reference(trainer, batch)
    result = trainer.step.run(batch, 0.01, layer_norms=True)

    valid = int((batch.labels_NS != IGNORE).sum())
    assert masked == (valid < 4 * 32)
    assert (result.tokens, result.valid_tokens, result.fault) == (4 * 32, valid, None)
    assert result.loss == pytest.approx(expected.loss.item() / valid, rel=1e-9)
    squares = {name: grad.square().sum().item() for name, grad in expected.grads.items()}
    assert result.grad_norm == pytest.approx(math.sqrt(sum(squares.values())) / valid, rel=1e-9)

    assert result.layer_norms is not None
    by_layer = [
        sum(square for name, square in squares.items() if name.startswith(f"layers.{layer}."))
        for layer in range(2)
    ]
    assert result.layer_norms.gradient == pytest.approx(
        [math.sqrt(square) / valid for square in by_layer], rel=1e-9
    )
    outside = sum(square for name, square in squares.items() if not name.startswith("layers."))
    of_layers = sum(norm**2 for norm in result.layer_norms.gradient)
    assert of_layers + outside / valid**2 == pytest.approx(result.grad_norm**2, rel=1e-9)


def test_the_first_layers_activation_is_the_root_mean_square_of_the_embeddings(
    make_config: MakeConfig,
) -> None:
    batch, trainer = batch_and_trainer(make_config, {"train.micro_batch": 1})
    masters = trainer.model.state.masters
    table = masters["tok_embeddings"].clone()
    masters["layers.0.wo"].zero_()  # the first layer then adds nothing
    masters["layers.0.w2"].zero_()
    result = trainer.step.run(batch, 0.01, layer_norms=True)
    x = table[torch.from_numpy(batch.tokens_NS)]
    assert result.layer_norms is not None
    assert result.layer_norms.activation == pytest.approx([x.square().mean().sqrt().item()] * 2)


def test_each_sources_loss_is_the_mean_over_its_valid_tokens(make_config: MakeConfig) -> None:
    batch, trainer = batch_and_trainer(make_config, {"data.mask_documents": True})
    assert len(set(batch.sources_N.tolist())) == 2
    expected = {}
    for source in set(batch.sources_N.tolist()):
        rows = batch.sources_N == source
        lengths = [n for n, mine in zip(batch.document_lengths or [], rows, strict=True) if mine]
        part = Batch(batch.tokens_NS[rows], batch.labels_NS[rows], batch.sources_N[rows], lengths)
        valid = int((part.labels_NS != IGNORE).sum())
        expected[source] = reference(trainer, part).loss.item() / valid
    result = trainer.step.run(batch, 0.01)
    assert result.layer_norms is None
    assert result.source_losses.keys() == expected.keys()
    for source, loss in expected.items():
        assert result.source_losses[source] == pytest.approx(loss, rel=1e-9)


def test_a_batch_without_a_label_is_left_out_without_a_fault(make_config: MakeConfig) -> None:
    batch, trainer = batch_and_trainer(make_config, {})
    empty = Batch(batch.tokens_NS, np.full_like(batch.labels_NS, IGNORE), batch.sources_N, None)
    before = flat(trainer.model.state.masters)
    result = trainer.step.run(empty, 0.01)
    assert not result.applied
    assert result.fault is None
    assert result.valid_tokens == 0
    assert np.isnan(result.loss)
    assert np.isnan(result.grad_norm)
    assert result.source_losses == {}
    assert flat(trainer.model.state.masters).equal(before)


def test_a_source_without_a_label_has_no_loss(make_config: MakeConfig) -> None:
    batch, trainer = batch_and_trainer(make_config, {})
    labels = batch.labels_NS.copy()
    labels[batch.sources_N == 1] = IGNORE
    result = trainer.step.run(Batch(batch.tokens_NS, labels, batch.sources_N, None), 0.01)
    assert result.applied
    assert result.source_losses.keys() == {0}
    assert result.source_losses[0] == pytest.approx(result.loss)


def test_micro_batches_are_the_batch_in_order(make_config: MakeConfig) -> None:
    batch, trainer = batch_and_trainer(make_config, {"data.mask_documents": True})
    for size in (1, 2, 4):
        samples = Samples(trainer.model, batch, size)
        assert len(samples) == 4 // size
        pieces = [samples.micro_batch(index) for index in range(len(samples))]
        assert torch.cat([p.tokens_T for p in pieces]).tolist() == batch.tokens_NS.ravel().tolist()
        assert torch.cat([p.labels_T for p in pieces]).tolist() == batch.labels_NS.ravel().tolist()
        losses = torch.cat([drive(trainer.model.chunks[0].forward(p, None, None)) for p in pieces])
        assert losses.sum().item() == pytest.approx(reference(trainer, batch).loss.item())
