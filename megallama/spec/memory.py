"""Bytes that one rank holds through a step, computed from the config alone."""

from __future__ import annotations

from math import prod

from megallama.config.schema import Config
from megallama.spec.grid import Grid, Place
from megallama.spec.parameters import EMBEDDING, parameter_table
from megallama.spec.saved import saved_bytes
from megallama.spec.shards import shard_table

#: train.precision → bytes of a weight or activation.
ITEMSIZE = {"bf16": 2, "fp32": 4, "fp64": 8}


def held_bytes(config: Config, grid: Grid) -> dict[str, int]:
    """Parameter buffers, moments, and what the layers save of one micro-batch, on rank 0."""
    table = shard_table(parameter_table(config.model), Place(grid, 0))
    whole = {shard.name: prod(shard.padded_shape) for shard in table}
    parameters, own = sum(whole.values()), sum(prod(shard.own_shape) for shard in table)
    itemsize = ITEMSIZE[config.train.precision]
    wide = max(itemsize, 4)  # masters, gradients and moments are fp32 or fp64
    tied = whole[EMBEDDING] if config.model.tie_embeddings else 0
    tokens = config.train.micro_batch * config.train.sequence_length
    a_layer = saved_bytes(
        config.model,
        config.train.saved_activations,
        itemsize,
        tokens,
        grid.tensor,
        config.parallel.sequence_parallel,
    )
    return {
        "weights": parameters * itemsize,
        "masters": own * wide if itemsize < wide else 0,
        "gradients": (parameters + tied) * wide,
        "moments": 2 * own * wide,
        "saved activations": config.model.layers * a_layer,
    }
