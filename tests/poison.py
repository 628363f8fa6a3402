"""Samples whose labels are one token that the text hardly has: the loss jumps where they come."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from megallama.data.dataset import Batch, Dataset

#: A token of the tiny data's vocabulary.
RARE = 299


def poison(samples: Collection[int]) -> None:
    """Have this process read these samples so. What it read of others is as it was."""
    read = Dataset.batch

    def batch(dataset: Dataset, first: int, count: int) -> Batch:
        found = read(dataset, first, count)
        bad = np.array([number in samples for number in range(first, first + count)])
        labels = np.where(bad[:, None], RARE, found.labels_NS)
        return replace(found, labels_NS=labels)

    Dataset.batch = batch  # type: ignore[method-assign]
