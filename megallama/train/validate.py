"""Validation loss: the mean over each source's held-out samples, and over all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megallama.data.dataset import Dataset
from megallama.train.build import Trainer
from megallama.train.host import read_back
from megallama.train.passes import valid_tokens


@dataclass(frozen=True)
class ValidationResult:
    """Mean losses in nats a token. NaN where the held-out samples hold no valid token."""

    loss: float
    by_source: dict[str, float]


def validate(trainer: Trainer, dataset: Dataset) -> ValidationResult:
    """Evaluate every held-out sample, one at a time, so that no batch size or number of data
    ranks changes a bit.

    Data ranks share the samples; every rank has the result.
    """
    sums, counts = {}, {}
    for source, name in enumerate(dataset.source_names):
        losses, valid = read_back(*_samples(trainer, dataset, source), over=trainer.groups["world"])
        sums[name], counts[name] = sum(losses), int(sum(valid))
    by_source = {name: _mean(sums[name], counts[name]) for name in sums}
    return ValidationResult(_mean(sum(sums.values()), sum(counts.values())), by_source)


def _samples(trainer: Trainer, dataset: Dataset, source: int) -> tuple[Tensor, Tensor]:
    """Loss and valid tokens of this data rank's samples in their places, zeros elsewhere."""
    place = trainer.place
    count, ranks = dataset.order.validation_sequences, place.grid.data
    first = count * place.along("data") // ranks
    last = count * (place.along("data") + 1) // ranks
    losses, valid = torch.zeros(2, count, dtype=torch.float64, device=trainer.device).unbind()
    if first == last:
        return losses, valid
    batch = dataset.validation_batch(source, first, last - first)
    mine = trainer.step.evaluate(batch)
    if trainer.step.tally.counts_samples:  # every tensor rank has them alike: the first one's count
        losses[first:last] = mine
        valid[first:last] = torch.from_numpy(valid_tokens(batch))
    return losses, valid


def _mean(total: float, count: int) -> float:
    return total / count if count else float("nan")
