"""Ranks whose programs are alike, found without running any.

A rank's place reaches its trainer through few things: its pipeline rank, which names its chunks,
its list of actions and its links; its shards, by their shapes, copies and owners, where padding
and replicated heads make ranks differ, though not which rows of a matrix they have; and whether it
is the first tensor rank, which counts what all of them have alike. Where these are equal, all
tensors have equal shapes and every branch goes the same way: ranks of a class issue the same
operations, each in its own groups.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from math import prod

from megallama.config.schema import Config
from megallama.spec.grid import Grid, Place
from megallama.spec.parameters import Parameter
from megallama.spec.shards import Shard, shard
from megallama.spec.stages import rank_tables


def classes(config: Config, grid: Grid) -> list[list[int]]:
    """The ranks of a job in classes; each class, and the list of classes, in ascending order."""
    found: dict[Hashable, list[int]] = {}
    kinds = [_kinds(config, Place(grid, rank)) for rank in grid.group("pipeline", 0)]
    parameters = {kind: parameter for each in kinds for kind, parameter in each.items()}
    shapes: dict[Hashable, Hashable] = {}
    for rank in range(grid.size):
        place = Place(grid, rank)
        at = grid.coordinates(rank)
        stage, tensor, data = at["pipeline"], at["tensor"], at["data"]
        for kind in kinds[stage]:
            if (kind, tensor, data) not in shapes:
                shapes[kind, tensor, data] = _shape(shard(parameters[kind], place))
        signature = tuple(shapes[kind, tensor, data] for kind in kinds[stage])
        found.setdefault((stage, tensor == 0, signature), []).append(rank)
    return sorted(found.values())


def _kinds(config: Config, place: Place) -> dict[Hashable, Parameter]:
    """One parameter of each kind on a pipeline rank: layers are alike."""
    tables: Iterable[Iterable[Shard]] = (table for _, table in rank_tables(config, place))
    parameters = (shard.parameter for table in tables for shard in table)
    return {_kind(parameter): parameter for parameter in parameters}


def _kind(parameter: Parameter) -> Hashable:
    parts = tuple((part.shape, part.heads) for part in parameter.parts)
    return parts, parameter.shard_dim, parameter.layer is None


def _shape(one: Shard) -> Hashable:
    """What shows of a shard in its rank's program: all but where it lies in its global tensor.

    Of rows that no other tensor rank holds, how many are owned; not of which parts they are.
    """
    shared = tuple(
        (piece.part.heads, piece.shape, piece.copies, piece.owned)
        for piece in one.own_pieces
        if piece.copies > 1
    )
    owned = sum(prod(p.shape) for p in one.own_pieces if p.copies == 1 and p.owned)
    held = tuple((piece.shape, piece.row) for piece in one.pieces)
    return one.shape, one.padded_rows, one.own_shape, shared, owned, held
