"""Validation loss: the mean over each source's held-out samples, and over all of them."""

from __future__ import annotations

from dataclasses import dataclass

from megallama.autograd.passes import drive
from megallama.data.dataset import Dataset
from megallama.model.llama import Llama
from megallama.train.host import read_back
from megallama.train.step import micro_batches, sample_losses, valid_tokens


@dataclass(frozen=True)
class ValidationResult:
    """Mean losses in nats a token. NaN where the held-out samples hold no valid token."""

    loss: float
    by_source: dict[str, float]


def validate(model: Llama, dataset: Dataset) -> ValidationResult:
    """Evaluate every held-out sample, one at a time, so that no batch size changes a bit."""
    sums, counts = {}, {}
    for source, name in enumerate(dataset.source_names):
        batch = dataset.validation_batch(source, 0, dataset.order.validation_sequences)
        losses = [
            sample_losses(drive(model.forward(sample, None)), samples=1)
            for sample in micro_batches(model, batch, size=1)
        ]
        sums[name] = sum(sum(values) for values in read_back(*losses))
        counts[name] = int(valid_tokens(batch).sum())
    by_source = {name: _mean(sums[name], counts[name]) for name in sums}
    return ValidationResult(_mean(sum(sums.values()), sum(counts.values())), by_source)


def _mean(total: float, count: int) -> float:
    return total / count if count else float("nan")
