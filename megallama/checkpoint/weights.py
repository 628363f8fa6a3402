"""A model's weights on their way from one format to another, a block of rows at a time.

Whoever holds weights (a checkpoint, a Hugging Face directory, Meta's files) gives each tensor of
the parameter table as consecutive blocks of rows; whoever writes takes them as they come. So a
conversion needs memory for a few blocks, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megallama.checkpoint.manifest import Manifest, Slice
from megallama.checkpoint.store import (
    Checkpoint,
    Rectangle,
    begin_checkpoint,
    commit_checkpoint,
    write_rank,
)
from megallama.config.load import parse_config
from megallama.config.schema import Config, Model
from megallama.errors import ConfigError, CorruptError
from megallama.spec.parameters import parameter_table

MASTER = "master"  # the kind under which a checkpoint keeps the weights
BLOCK_BYTES = 1 << 28  # of a block that is read at once

#: The types in which other formats have weights, by the words of `train.precision` and fp16.
PRECISIONS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


class Weights(Protocol):
    """Weights by the names and shapes of the parameter table of `config.model`."""

    @property
    def config(self) -> Config:
        """The run that the weights are of; of converted ones the model and the precision count."""

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The rows of a tensor (elements of a vector) in order, a block at a time."""


def checkpoint_config(checkpoint: Checkpoint) -> Config:
    """The config of the run that a checkpoint is of. Raises CorruptError where it is none."""
    try:
        return parse_config(checkpoint.manifest.config)
    except ConfigError as error:
        raise CorruptError(
            f"{checkpoint.directory}: its config is no run's: {'; '.join(str(error).splitlines())}"
        ) from None


def part_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Name and shape of every global tensor, in the order of the table."""
    return {part.name: part.shape for weight in parameter_table(model) for part in weight.parts}


def weight_bytes(model: Model, precision: str) -> int:
    """What a model's weights take in a precision."""
    return sum(map(prod, part_shapes(model).values())) * PRECISIONS[precision].itemsize


def row_blocks(rows: int, row_bytes: int, unit: int = 1) -> Iterator[tuple[int, int]]:
    """The first row and the number of rows of every block; blocks hold whole units of rows."""
    height = max(1, BLOCK_BYTES // (row_bytes * unit)) * unit
    for first in range(0, rows, height):
        yield first, min(height, rows - first)


class CheckpointWeights:
    """The weights of a checkpoint of any layout, every byte checked against its hash.

    Its slices decide the blocks: a slice is held whole, because its hash is that of all of it.

    Raises:
        CorruptError: the manifest does not hold the tensors of its own config.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.config = checkpoint_config(checkpoint)
        for name, shape in part_shapes(self.config.model).items():
            entry = checkpoint.manifest.tensors.get(f"{MASTER}/{name}")
            if entry is None or entry.shape != shape:
                found = f"has shape {entry.shape}" if entry else "is missing"
                raise CorruptError(
                    f"{checkpoint.directory}: tensor '{MASTER}/{name}' {found}, its config says "
                    f"{shape}; use another checkpoint"
                )

    def blocks(self, name: str) -> Iterator[Tensor]:
        for region in stored_regions(f"{MASTER}/{name}", self._checkpoint):
            yield self._checkpoint.read(f"{MASTER}/{name}", region)


def stored_regions(name: str, *checkpoints: Checkpoint) -> Iterator[tuple[slice, ...]]:
    """Regions, row after row, that begin and end where slices of all the checkpoints do.

    Smaller ones would have a slice read, and its hash computed, several times.
    """
    entries = [checkpoint.manifest.tensors[name] for checkpoint in checkpoints]
    shape = entries[0].shape
    cuts = set.intersection(*({row for s in e.slices for row in _rows_of(s)} for e in entries))
    for first, last in pairwise(sorted(cuts | {0, shape[0]})):
        yield slice(first, last), *(slice(0, n) for n in shape[1:])


def _rows_of(piece: Slice) -> tuple[int, int]:
    return piece.start[0], piece.start[0] + piece.shape[0]


def write_checkpoint(directory: Path, weights: Weights, facts: Manifest) -> None:
    """Make `directory` a checkpoint of these weights; `facts` is its manifest but for tensors.

    fp16 weights become fp32, which holds them exactly and which checkpoints have; others keep
    their type.

    Raises:
        ConfigError: the disk refuses.
    """
    begin_checkpoint(directory)
    texts = [
        write_rank(directory, number, rectangles)
        for number, rectangles in enumerate(_files(weights))
    ]
    commit_checkpoint(directory, texts, facts)


def _files(weights: Weights) -> Iterator[list[Rectangle]]:
    """Rectangles file by file. A file has one of a tensor at most: they are named after it."""
    file: dict[str, Rectangle] = {}
    size = 0
    for name, shape in part_shapes(weights.config.model).items():
        key, row = f"{MASTER}/{name}", 0
        for block in weights.blocks(name):
            data = block.float() if block.dtype == torch.float16 else block
            if key in file or (file and size + data.nbytes > BLOCK_BYTES):
                yield list(file.values())
                file, size = {}, 0
            file[key] = Rectangle(key, shape, (row, *(0 for _ in shape[1:])), data)
            row, size = row + len(block), size + data.nbytes
    yield list(file.values())


def cast(block: Tensor, precision: str, name: str) -> Tensor:
    """A block in another type; raises ConfigError where a finite value would become infinite."""
    result = block.to(PRECISIONS[precision])
    if result.dtype != block.dtype and not torch.equal(result.isfinite(), block.isfinite()):
        largest = float(block[block.isfinite()].abs().max())
        raise ConfigError(
            f"{name}: holds {largest:.6g}, too large for --dtype {precision}; take a wider one"
        )
    return result


def narrowest_precision(dtypes: Set[torch.dtype | str], path: object) -> str:
    """The `train.precision` in which weights of these types are exact.

    Raises ConfigError for a type that is no float of 16 bits or more.
    """
    for dtype in set(dtypes) - set(PRECISIONS.values()):
        raise ConfigError(
            f"{path}: holds tensors of type {dtype}; convert a model that is not quantised"
        )
    if dtypes == {torch.bfloat16}:
        return "bf16"
    return "fp64" if torch.float64 in dtypes else "fp32"


def config_of(shape: Mapping[str, Any], context: int, precision: str, path: object) -> Config:
    """The config of weights that were not trained here: their model, and a run of one step.

    `shape` is the model section, `context` the longest sequence in tokens. `--init-from` takes the
    model alone, and `generate` the precision and the context.

    Raises ConfigError naming `path` for a shape that megallama does not have.
    """
    sections = {
        "run": {"name": "converted"},
        "model": dict(shape),
        "train": {
            "steps": 1,
            "sequence_length": context,
            "global_batch": 1,
            "precision": precision,
        },
        "optimizer": {"lr": 1e-4, "warmup_steps": 0},
    }
    try:
        return parse_config(sections)
    except ConfigError as error:
        raise ConfigError(f"{path}: {'; '.join(str(error).splitlines())}") from None
