"""Validation: held-out samples, one value however they are batched, and nothing changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from megallama.config.schema import Config
from megallama.data.dataset import Batch, Dataset
from megallama.spec.labels import IGNORE
from megallama.train.build import Trainer, build_dataset, build_trainer
from megallama.train.job import train
from megallama.train.metrics import read_metrics
from megallama.train.validate import validate
from tests.conftest import MakeConfig
from tests.harness import flat, parts, put
from tests.reference import plain


def trained(config: Config) -> tuple[Trainer, Dataset]:
    """A trainer after two steps: initial weights give every source the same loss."""
    trainer, dataset = build_trainer(config), build_dataset(config)
    for step in range(2):
        trainer.step.run(dataset.batch(4 * step, 4), 0.01)
    return trainer, dataset


def expected(trainer: Trainer, batch: Batch) -> tuple[float, int]:
    """The summed loss and the count of valid tokens, by plain PyTorch in fp64."""
    state = trainer.model.state
    weights = {name: t.double() for name, t in parts(state, state.masters).items()}
    tokens, labels = torch.from_numpy(batch.tokens_NS), torch.from_numpy(batch.labels_NS)
    loss = plain.forward_backward(
        trainer.config.model, weights, tokens, labels, document_lengths=batch.document_lengths
    ).loss
    return loss.item(), int((batch.labels_NS != IGNORE).sum())


@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_mean_loss_of_the_held_out_tokens(make_config: MakeConfig, masked: bool) -> None:
    changes: dict[str, Any] = {"data.mask_documents": masked, "train.precision": "fp64"}
    trainer, dataset = trained(make_config(changes))
    result = validate(trainer, dataset)
    assert list(result.by_source) == ["code", "prose"]
    sums, counts = [], []
    for source, name in enumerate(dataset.source_names):
        total, count = expected(trainer, dataset.validation_batch(source, 0, 5))
        assert result.by_source[name] == pytest.approx(total / count, rel=1e-9)
        sums.append(total)
        counts.append(count)
    assert result.loss == pytest.approx(sum(sums) / sum(counts), rel=1e-9)
    assert masked == (counts[0] != counts[1])


def test_it_is_the_same_at_any_micro_batch(make_config: MakeConfig) -> None:
    trainer, dataset = trained(make_config())
    results = []
    for size in (1, 2, 4):
        other = build_trainer(make_config({"train.micro_batch": size}))
        put(other.model.state.masters, trainer.model.state.masters)
        results.append(validate(other, dataset))
    assert results[0] == results[1] == results[2]


def test_it_changes_nothing(make_config: MakeConfig) -> None:
    trainer, dataset = trained(make_config())
    state = trainer.model.state
    before = [flat(t) for t in (state.masters, state.weights, state.gradients)]
    validate(trainer, dataset)
    after = [flat(t) for t in (state.masters, state.weights, state.gradients)]
    assert all(a.equal(b) for a, b in zip(after, before, strict=True))


def test_validating_more_often_changes_no_step(make_config: MakeConfig) -> None:
    def steps(config: Config) -> list[tuple[float, float]]:
        assert train(config) == 0
        rows = read_metrics(config.run.directory / "metrics.jsonl")
        return [(row["loss"], row["grad_norm"]) for row in rows if "loss" in row]

    often = make_config({"run.name": "often", "validation.every": 1})
    seldom = make_config({"run.name": "seldom", "validation.every": 6})
    assert steps(often) == steps(seldom)


def test_held_out_samples_are_never_trained_on(make_config: MakeConfig) -> None:
    dataset = build_dataset(make_config())
    for source in range(2):
        held_out = set(dataset.order.validation_windows(source, range(5)).tolist())
        assert len(held_out) == 5
        where = dataset.order.locate(range(2000))
        mine = where.source == source
        assert where.epoch[mine].max() >= 2
        trained_on = set(where.window[mine].tolist())
        assert not trained_on & held_out
        total = (dataset._files[source].tokens - 1) // 32
        assert trained_on | held_out == set(range(total))


def test_a_source_without_a_valid_token_is_not_a_number(make_config: MakeConfig) -> None:
    trainer, dataset = trained(make_config())

    class Unlabelled:
        """The dataset with `code` unlabelled."""

        source_names, order = dataset.source_names, dataset.order
        sequence_length = dataset.sequence_length

        def validation_batch(self, source: int, first: int, count: int) -> Batch:
            batch = dataset.validation_batch(source, first, count)
            if source == 1:
                return batch
            return dataclasses.replace(batch, labels_NS=np.full_like(batch.labels_NS, IGNORE))

    result = validate(trainer, Unlabelled())  # type: ignore[arg-type]
    assert np.isnan(result.by_source["code"])
    assert result.loss == result.by_source["prose"]
