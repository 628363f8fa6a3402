"""A training step of test size over given weights, and its batches."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from megallama.config.schema import Optimizer
from megallama.data.dataset import Batch
from megallama.optim.adamw import AdamW
from megallama.train.step import TrainStep
from tests import reference
from tests.harness import build_model
from tests.reference import ShapeLike


def optimizer_config(**changes: object) -> Optimizer:
    values = {"lr": 1e-3, "warmup_steps": 0, "schedule": "constant", "eps": 1e-5}
    return Optimizer(**(values | changes))


def build_step(
    shape: ShapeLike,
    weights: Mapping[str, Tensor],
    micro_batch: int,
    config: Optimizer | None = None,
    dtype: torch.dtype = torch.float64,
) -> TrainStep:
    model = build_model(shape, weights, dtype)
    state, config = model.state, config or optimizer_config()
    optimizer = AdamW(config, state.table, state.masters, state.gradients)
    return TrainStep(model, optimizer, micro_batch, config.grad_clip)


def step_batch(batch: reference.Batch) -> Batch:
    """A reference's batch as a step takes it."""
    tokens, labels, lengths = batch
    sources = np.zeros(len(tokens), np.int64)
    documents = None if lengths is None else [list(row) for row in lengths]
    return Batch(tokens.numpy(), labels.numpy(), sources, documents)
