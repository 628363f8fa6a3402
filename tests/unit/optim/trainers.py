"""A training step of test size over given weights, and its batches."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from megallama.config.load import parse_config
from megallama.config.schema import Optimizer
from megallama.data.dataset import Batch
from megallama.dist.connect import connect
from megallama.dist.group import SingleGroup
from megallama.optim.adamw import AdamW
from megallama.parallel.zero import Zero, ZeroGroups
from megallama.spec.grid import ALONE
from megallama.train.build import build_pipelines
from megallama.train.step import TrainStep
from tests import reference
from tests.harness import build_model, model_config
from tests.reference import ShapeLike

CPU = torch.device("cpu")


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
    model, group = build_model(shape, weights, dtype), SingleGroup()
    groups = connect(None, 0, ALONE.groups(kv_heads=1), model.state.device)
    state, config = model.state, config or optimizer_config()
    zero = Zero(state, ZeroGroups(group, group, group))
    optimizer = AdamW(config, state)
    train = {"steps": 1, "sequence_length": 1}
    train |= {"micro_batch": micro_batch, "global_batch": micro_batch}
    sections = {"model": model_config(shape), "optimizer": config}
    dumped = {name: section.model_dump(mode="json") for name, section in sections.items()}
    whole = parse_config({"train": train, **dumped})
    pipelines = build_pipelines(whole, ALONE, groups)
    return TrainStep(model, zero, optimizer, groups.by_name, ALONE, pipelines, whole)


def step_batch(batch: reference.Batch) -> Batch:
    """A reference's batch as a step takes it."""
    tokens, labels, lengths = batch
    sources = np.zeros(len(tokens), np.int64)
    documents = None if lengths is None else [list(row) for row in lengths]
    return Batch(tokens.numpy(), labels.numpy(), sources, documents)
