"""Shards: over all ranks of any grid they are the global tensors, no element more or less."""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm, prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.config.schema import Model
from megallama.spec.buckets import buckets
from megallama.spec.grid import ALONE, Grid, Place
from megallama.spec.parameters import EMBEDDING, OUTPUT, Parameter, parameter_table
from megallama.spec.shards import Piece, Shard, shard, shard_table, vocab_rows
from tests.harness import model_config
from tests.reference import Shape


@st.composite
def cases(draw: st.DrawFn) -> tuple[Model, Grid]:
    """Models and grids that a config may ask for: heads and ffn are divided, the vocabulary and
    the key/value heads need not be."""
    tensor = draw(st.integers(1, 8))
    fitting = [n for n in range(1, 17) if n % tensor == 0 or tensor % n == 0]
    kv_heads = draw(st.sampled_from(fitting))
    heads = lcm(tensor, kv_heads) * draw(st.integers(1, 2))
    model = Model(
        d_model=heads * 2 * draw(st.integers(1, 2)),
        layers=1,
        heads=heads,
        kv_heads=kv_heads,
        ffn=tensor * draw(st.integers(1, 5)),
        vocab=draw(st.integers(1, 40)),
        tie_embeddings=draw(st.booleans()),
    )
    return model, Grid(tensor=tensor, data=draw(st.integers(1, 4)))


def places(grid: Grid) -> Iterator[Place]:
    return (Place(grid, rank) for rank in range(grid.size))


@given(cases())
@settings(max_examples=150, deadline=None)
def test_the_pieces_of_all_ranks_tile_every_part(case):
    """Each element is on exactly `copies` ranks, and owned by exactly one of them."""
    model, grid = case
    for parameter in parameter_table(model):
        held = {part.name: np.zeros(part.shape, int) for part in parameter.parts}
        owned = {part.name: np.zeros(part.shape, int) for part in parameter.parts}
        copies = {part.name: np.zeros(part.shape, int) for part in parameter.parts}
        for place in places(grid):
            for piece in shard(parameter, place).own_pieces:
                assert prod(piece.shape) > 0, "no piece is empty"
                held[piece.part.name][piece.region] += 1
                owned[piece.part.name][piece.region] += piece.owned
                copies[piece.part.name][piece.region] = piece.copies
        for name in held:
            assert (held[name] == copies[name]).all(), name
            assert (owned[name] == 1).all(), name


@given(cases())
@settings(max_examples=150, deadline=None)
def test_the_pieces_of_the_tensor_ranks_tile_every_part(case):
    """What the passes multiply by, which data ranks have alike."""
    model, grid = case
    for parameter in parameter_table(model):
        held = {part.name: np.zeros(part.shape, int) for part in parameter.parts}
        for place in places(grid):
            mine = shard(parameter, place)
            assert mine.pieces == shard(parameter, Place(grid, place.along("tensor"))).pieces
            if place.along("data") == 0:
                for piece in mine.pieces:
                    held[piece.part.name][piece.region] += 1
        copies = {piece.part.name: piece.copies for piece in shard(parameter, ALONE).pieces}
        assert set(copies.values()) == {1}
        for name, counts in held.items():
            assert counts.min() == counts.max() >= 1, name


def _fits(piece: Piece, rows: int, columns: tuple[int, ...]) -> bool:
    part = piece.part
    ends = (start + n for start, n in zip(piece.start, piece.shape, strict=True))
    in_part = all(end <= size for end, size in zip(ends, part.shape, strict=True))
    return in_part and piece.rows.stop <= rows and piece.shape[1:] == columns


@given(cases())
@settings(max_examples=150, deadline=None)
def test_shapes_and_padding_agree(case):
    model, grid = case
    table = parameter_table(model)
    for place in places(grid):
        for mine in shard_table(table, place):
            _check_shapes(mine, place)
            _check_rows(mine, mine.shape[0], mine.pieces, grid.tensor)


def _check_shapes(mine: Shard, place: Place) -> None:
    grid = place.grid
    assert mine.padded_shape == (mine.padded_rows, *mine.shape[1:])
    assert 0 <= mine.padded_rows - mine.shape[0] < grid.data
    assert mine.padded_rows == mine.own_shape[0] * grid.data
    first = place.along("data") * mine.own_shape[0]
    assert mine.own_rows == slice(first, first + mine.own_shape[0])
    assert mine.own_shape[1:] == mine.shape[1:]
    assert all(_fits(piece, mine.shape[0], mine.shape[1:]) for piece in mine.pieces)
    assert all(_fits(piece, mine.own_shape[0], mine.own_shape[1:]) for piece in mine.own_pieces)
    # The optimizer's pieces are those of the passes, cut to its rows.
    rows = {
        (piece.part.name, piece.start[0] + i): piece.row + i
        for piece in mine.pieces
        for i in range(piece.shape[0])
    }
    for piece in mine.own_pieces:
        for i in range(piece.shape[0]):
            here = mine.own_rows.start + piece.row + i
            assert rows.pop((piece.part.name, piece.start[0] + i)) == here
    outside = [row for row in rows.values() if first <= row < mine.own_rows.stop]
    assert outside == [], "a row of this rank is in no piece"


def _check_rows(mine: Shard, rows: int, pieces: tuple[Piece, ...], tensor: int) -> None:
    """Pieces do not overlap; rows in none are at the end of a vocabulary alone."""
    taken = np.zeros(rows, int)
    for piece in pieces:
        taken[piece.rows] += 1
    assert taken.max(initial=0) <= 1
    padding = np.flatnonzero(taken == 0)
    if mine.name not in (EMBEDDING, OUTPUT):
        assert len(padding) == 0
        return
    vocab = mine.parameter.shape[0]
    assert rows == vocab_rows(vocab, tensor)
    assert list(padding) == list(range(rows - len(padding), rows))
    assert (vocab % tensor == 0) <= (len(padding) == 0)


def test_a_grouped_layer_written_out():
    """Eight heads and two key/value heads of width 4 on four ranks: two ranks hold one head."""
    model = Model(d_model=32, layers=1, heads=8, kv_heads=2, ffn=12, vocab=10)
    table = {p.name: p for p in parameter_table(model)}
    third = Place(Grid(tensor=4, data=2), 2)
    wqkv = shard(table["layers.0.wqkv"], third)
    assert wqkv.shape == (8 + 4 + 4, 32)
    found = [(p.part.name[-9:-7], p.start, p.shape, p.row, p.copies, p.owned) for p in wqkv.pieces]
    assert found == [
        ("wq", (16, 0), (8, 32), 0, 1, True),
        ("wk", (4, 0), (4, 32), 8, 2, True),
        ("wv", (4, 0), (4, 32), 12, 2, True),
    ]
    last = shard(table["layers.0.wqkv"], Place(Grid(tensor=4, data=2), 7))
    assert [p.owned for p in last.pieces] == [True, False, False], "the rank before it has the head"
    # Data rank 1 has rows 8 to 16 of these.
    assert [(p.part.name[-9:-7], p.start, p.row) for p in last.own_pieces] == [
        ("wk", (4, 0), 0),
        ("wv", (4, 0), 4),
    ]
    wo, w13 = shard(table["layers.0.wo"], third), shard(table["layers.0.w13"], third)
    assert [(p.start, p.shape) for p in wo.pieces] == [((0, 16), (32, 8))]
    assert [(p.start, p.shape, p.row) for p in w13.pieces] == [
        ((6, 0), (3, 32), 0),
        ((6, 0), (3, 32), 3),
    ]
    norm = shard(table["norm"], third)
    assert [(p.start, p.shape, p.copies, p.owned) for p in norm.pieces] == [((0,), (32,), 4, False)]
    # Ten rows of the vocabulary over four ranks: 3, 3, 3 and 1 with two of padding.
    rows = [shard(table["output"], Place(Grid(tensor=4), rank)).pieces for rank in range(4)]
    assert [(p.start[0], p.shape[0]) for (p,) in rows] == [(0, 3), (3, 3), (6, 3), (9, 1)]


def test_a_vocabulary_smaller_than_its_ranks_leaves_some_with_padding_alone():
    table = parameter_table(model_config(Shape(vocab=3, heads=4, kv_heads=4, ffn=44)))
    for rank, count in enumerate((1, 1, 1, 0)):
        mine = shard(table[0], Place(Grid(tensor=4), rank))
        assert mine.shape == (1, 32)
        assert len(mine.pieces) == count


def test_alone_a_shard_is_the_whole():
    for parameter in parameter_table(model_config(Shape())):
        mine = shard(parameter, ALONE)
        assert mine.shape == mine.padded_shape == mine.own_shape == parameter.shape
        assert mine.pieces == mine.own_pieces
        assert [p.shape for p in mine.pieces] == [part.shape for part in parameter.parts]
        assert all(p.owned and p.copies == 1 and not any(p.start) for p in mine.pieces)


@pytest.mark.parametrize("tied", [False, True])
def test_buckets_are_layers_in_the_order_of_a_forward(tied):
    """The norms, needed first and small, travel with the embedding."""
    table = parameter_table(model_config(Shape(layers=2, tie_embeddings=tied)))
    first = ("attention_norm", "ffn_norm")
    expected = [
        (
            "tok_embeddings",
            *(f"layers.{i}.{name}" for i in range(2) for name in first),
            "norm",
        ),
        *(tuple(f"layers.{i}.{name}" for name in ("wqkv", "wo", "w13", "w2")) for i in range(2)),
    ]
    assert list(buckets(table)) == (expected if tied else [*expected, ("output",)])


@given(names=st.sets(st.integers(0, 14)))
@settings(deadline=None)
def test_every_parameter_is_in_one_bucket_and_none_is_empty(names):
    """Of any part of a table: a pipeline stage has some layers and perhaps no embedding."""
    table: tuple[Parameter, ...] = parameter_table(model_config(Shape(layers=2)))
    some = [p for i, p in enumerate(table) if i in names]
    found = buckets(some)
    assert all(found)
    assert sorted(name for bucket in found for name in bucket) == sorted(p.name for p in some)
