"""Bytes that one rank holds through a step, computed from the config alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from math import prod

from megallama.config.schema import Config
from megallama.spec.grid import Grid, Place
from megallama.spec.groups import run_schedule
from megallama.spec.parameters import EMBEDDING
from megallama.spec.saved import saved_bytes, weight_state_bytes
from megallama.spec.schedules.actions import Action, passes
from megallama.spec.stages import has_tied_copy, rank_tables

#: train.precision → bytes of a weight or activation.
ITEMSIZE = {"bf16": 2, "fp32": 4, "fp64": 8}


def held_bytes(config: Config, grid: Grid) -> dict[str, int]:
    """What the pipeline rank that holds the most holds, by kind."""
    ranks = zip(grid.group("pipeline", 0), run_schedule(config, grid).actions, strict=True)
    every = [rank_bytes(config, Place(grid, rank), actions) for rank, actions in ranks]
    return max(every, key=lambda sizes: sum(sizes.values()))


def rank_bytes(config: Config, place: Place, actions: Sequence[Action]) -> dict[str, int]:
    """Parameter buffers, moments, and the most that the layers save at once, on one rank.

    `actions`: the rank's list (`run_schedule`).
    """
    tables = rank_tables(config, place)
    table = tuple(chain.from_iterable(shards for _, shards in tables))
    parameters = sum(prod(shard.padded_shape) for shard in table)
    own = sum(prod(shard.own_shape) for shard in table)
    itemsize = ITEMSIZE[config.train.precision]
    wide = max(itemsize, 4)  # masters, gradients and moments are fp32 or fp64
    sizes = {
        "weights": parameters * itemsize,
        "masters": own * wide if itemsize < wide else 0,
        "gradients": (parameters + _second_gradient(config, place)) * wide,
        "moments": 2 * own * wide,
    }
    if config.parallel.early_step:
        sizes["kept for early_step"] = 3 * own * wide  # masters and moments
    return sizes | _saved(config, place, actions)


def _second_gradient(config: Config, place: Place) -> int:
    """Elements of a tied output projection's own gradient, where the embedding is on its rank."""
    if not config.model.tie_embeddings or has_tied_copy(config, place.grid):
        return 0
    shards = chain.from_iterable(table for _, table in rank_tables(config, place))
    return sum(prod(shard.padded_shape) for shard in shards if shard.name == EMBEDDING)


def _saved(config: Config, place: Place, actions: Sequence[Action]) -> dict[str, int]:
    """What the layers save of all micro-batches that are under way, at the schedule's peaks."""
    model, train, parallel = config.model, config.train, config.parallel
    itemsize, tokens = ITEMSIZE[train.precision], train.micro_batch * train.sequence_length
    tensor, divided = place.grid.tensor, parallel.sequence_parallel
    layers = {chunk.index: len(chunk.layers) for chunk, _ in rank_tables(config, place)}
    a_layer = saved_bytes(model, train.saved_activations, itemsize, tokens, tensor, divided)
    sizes = {"saved activations": peak_layers(actions, layers, "F", ("B", "BW")) * a_layer}
    if split := peak_layers(actions, layers, "B", ("W",)):
        a_layer = weight_state_bytes(model, itemsize, tokens, tensor, divided)
        sizes["saved from B to W"] = split * a_layer
    return sizes


def peak_layers(
    actions: Sequence[Action], layers: Mapping[int, int], begin: str, ends: Collection[str]
) -> int:
    """The most layers of which sets are held at once; `layers`: of each chunk.

    A set is held from the pass of kind `begin` to the one of a kind in `ends`, both included: in a
    fused action the forward's is there before the backward's is gone.
    """
    held = peak = 0
    for one in passes(actions):
        if one.kind == begin:
            held += layers[one.chunk]
            peak = max(peak, held)
        elif one.kind in ends:
            held -= layers[one.chunk]
    return peak
