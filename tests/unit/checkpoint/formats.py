"""What the tests of other systems' formats share: shapes, checkpoints of any layout, logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from megallama.autograd.passes import drive
from megallama.checkpoint.manifest import Manifest
from megallama.checkpoint.store import (
    Checkpoint,
    Rectangle,
    begin_checkpoint,
    commit_checkpoint,
    write_rank,
)
from megallama.checkpoint.weights import config_of
from megallama.config.load import parse_config
from megallama.config.schema import Config
from megallama.spec.grid import Grid, Place
from megallama.spec.parameters import parameter_table
from megallama.spec.shards import shard_table
from megallama.train.build import build_lone_model
from megallama.train.snapshot import Progress, restore_weights
from tests.reference import RopeScaling, Shape

SCALING = RopeScaling(8.0, 1.0, 4.0, 8192)
SHAPES = {
    "MHA": Shape(heads=4, kv_heads=4),
    "GQA": Shape(heads=8, kv_heads=2, ffn=44),
    "tied": Shape(tie_embeddings=True, rope_theta=500_000.0),
    "scaled": Shape(rope_scaling=SCALING, rope_theta=500_000.0, norm_eps=1e-6),
}
#: How many tensor and data ranks a checkpoint is of.
GRIDS = {"one rank": Grid(), "4 x 3 ranks": Grid(tensor=4, data=3)}


def config_for(shape: Shape, precision: str = "fp64") -> Config:
    """The config of a model of this shape."""
    model = asdict(shape)
    if shape.rope_scaling:
        model["rope_scaling"] = shape.rope_scaling._asdict()
    return config_of(model, 64, precision, "test")


def save_checkpoint(
    directory: Path,
    shape: Shape,
    weights: Mapping[str, Tensor],
    grid: Grid = GRIDS["one rank"],
    precision: str = "fp64",
) -> Checkpoint:
    """A checkpoint of these weights as the ranks of a grid would write it."""
    config = config_for(shape, precision)
    begin_checkpoint(directory)
    texts = []
    for rank in range(grid.size):
        rectangles = [
            Rectangle(
                f"master/{piece.part.name}",
                piece.part.shape,
                piece.start,
                weights[piece.part.name][piece.region],
            )
            for shard in shard_table(parameter_table(config.model), Place(grid, rank))
            for piece in shard.own_pieces
            if piece.owned
        ]
        texts.append(write_rank(directory, rank, rectangles))
    facts = Manifest(asdict(Progress()), config.model_dump(mode="json"), None, {})
    commit_checkpoint(directory, texts, facts)
    return Checkpoint(directory)


def our_logits(checkpoint: Checkpoint, tokens_BS: Tensor) -> Tensor:
    """Logits (B, S, V) of the passes, in fp64, from the weights of a checkpoint."""
    config = parse_config(checkpoint.manifest.config)
    train = config.train.model_copy(update={"precision": "fp64"})
    config = config.model_copy(update={"train": train})
    model, zero = build_lone_model(config, torch.device("cpu"))
    restore_weights(model, zero, checkpoint)
    positions = model.positions([[tokens_BS.shape[1]]])
    return torch.stack([drive(model.logits(tokens_S, positions)) for tokens_S in tokens_BS])


def bits_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether both have the same names, types, shapes and bits."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and torch.equal(
            a[name].contiguous().view(torch.uint8), b[name].contiguous().view(torch.uint8)
        )
        for name in a
    )


def read_all(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every weight of a checkpoint."""
    names = checkpoint.manifest.tensors
    return {name.removeprefix("master/"): checkpoint.read(name) for name in names}
