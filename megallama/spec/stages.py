"""Which layers each chunk of a pipeline has, and which shards of them a rank holds.

A chunk is a run of layers; the first has the embedding too, the last the final norm and the output
projection. Each pipeline rank has one chunk, or several (virtual stages).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from megallama.config.schema import Config, Model, Parallel
from megallama.spec.flops import head_flops, layer_flops
from megallama.spec.grid import Grid, Place
from megallama.spec.parameters import EMBEDDING, Parameter, parameter_table
from megallama.spec.schedules.build import chunk_owners
from megallama.spec.shards import Shard, shard, shard_table

#: Bytes that the embedding moves a token and element of D, in bf16 with fp32 gradients: the row is
#: read and written, in the backward dx is read, and the gradient's row read and written.
EMBEDDING_BYTES = 2 + 2 + 2 + 4 + 4
#: FLOPs in the time of a byte: an A100-80GB's 312 TFLOP/s over 2039 GB/s (its data sheet). With it
#: the embedding is 2142·D a token, a hundredth of the head at V = 32,000: any GPU's will do.
MACHINE_BALANCE = 153


@dataclass(frozen=True)
class Chunk:
    """A run of layers, numbered from the embedding to the head."""

    index: int
    layers: range
    embedding: bool
    head: bool


def split_model(
    model: Model, parallel: Parallel, chunks: int, sequence_length: int
) -> tuple[Chunk, ...]:
    """The chunks in model order, by `parallel.stage_layers`; every one has at least one layer."""
    return _chunks(layer_counts(model, parallel, chunks, sequence_length))


def layer_counts(
    model: Model, parallel: Parallel, chunks: int, sequence_length: int
) -> tuple[int, ...]:
    """The number of layers of each chunk, in model order."""
    if not isinstance(parallel.stage_layers, str):
        return parallel.stage_layers
    ends = [0] * chunks
    if parallel.stage_layers == "cost":
        layer = layer_flops(model, sequence_length)
        ends[0] += EMBEDDING_BYTES * MACHINE_BALANCE * model.d_model
        ends[-1] += head_flops(model)
    else:  # layers alone count; among equals, the chunks with an end take a spare one last
        layer = 3
        ends[0] += 1
        ends[-1] += 2
    return _greedy(model.layers, layer, ends)


def _greedy(layers: int, layer: int, ends: Sequence[int]) -> tuple[int, ...]:
    """Layers of each chunk such that the largest chunk's cost is least.

    Each chunk gets a layer, and each further layer goes to the chunk that is cheapest. That is
    optimal. Adding a layer to a chunk gives it its next cost, and a chunk's costs rise; the greedy
    additions are those with the smallest costs of all that are possible, in ascending order. Any
    other split makes as many additions and so has one at least as costly as the greedy's last.

    Of equally cheap chunks the latest gets the layer: in 1F1B and its kin an earlier rank holds
    more micro-batches, so a layer more costs the least memory late.
    """
    counts = [1] * len(ends)
    cheapest = [(end + layer, -chunk) for chunk, end in enumerate(ends)]
    heapq.heapify(cheapest)
    for _ in range(layers - len(ends)):
        cost, chunk = cheapest[0]
        counts[-chunk] += 1
        heapq.heapreplace(cheapest, (cost + layer, chunk))
    return tuple(counts)


def _chunks(counts: Sequence[int]) -> tuple[Chunk, ...]:
    bounds = pairwise(accumulate(counts, initial=0))
    last = len(counts) - 1
    return tuple(
        Chunk(index, range(first, end), embedding=index == 0, head=index == last)
        for index, (first, end) in enumerate(bounds)
    )


def chunks_of(config: Config, grid: Grid) -> tuple[Chunk, ...]:
    """A run's chunks on a grid."""
    chunks = grid.pipeline * config.parallel.chunks_per_rank
    return split_model(config.model, config.parallel, chunks, config.train.sequence_length)


def owners_of(config: Config, grid: Grid) -> tuple[int, ...]:
    """The pipeline rank of each chunk; the first chunk's, with the embedding, is always 0."""
    parallel = config.parallel
    return chunk_owners(parallel.schedule, grid.pipeline, parallel.chunks_per_rank)


def has_tied_copy(config: Config, grid: Grid) -> bool:
    """Whether the head's rank has a copy of the embedding: they are tied, on different ranks."""
    return config.model.tie_embeddings and owners_of(config, grid)[-1] != 0


def chunk_parameters(model: Model, chunk: Chunk) -> tuple[Parameter, ...]:
    """A chunk's part of the parameter table, in its order."""

    def has(parameter: Parameter) -> bool:
        if parameter.layer is not None:
            return parameter.layer in chunk.layers
        return chunk.embedding if parameter.name == EMBEDDING else chunk.head

    return tuple(filter(has, parameter_table(model)))


def rank_tables(config: Config, place: Place) -> tuple[tuple[Chunk, tuple[Shard, ...]], ...]:
    """Of each chunk on a rank, ascending, its shards.

    Tied embeddings on different ranks: the last chunk's table ends, where the output projection
    would stand, with a copy of the embedding's shard, which owns nothing.
    """
    grid, rank = place.grid, place.along("pipeline")
    tables = []
    for chunk, owner in zip(chunks_of(config, grid), owners_of(config, grid), strict=True):
        if owner == rank:
            table = shard_table(chunk_parameters(config.model, chunk), place)
            if chunk.head and has_tied_copy(config, grid):
                table += (shard(parameter_table(config.model)[0], place, copy=True),)
            tables.append((chunk, table))
    return tuple(tables)
