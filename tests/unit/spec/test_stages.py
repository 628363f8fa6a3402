"""Stages: the best split by brute force, and ranks that together have the model once."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, pairwise
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.config.schedules import default_virtual_stages
from megallama.config.schema import Model, Parallel
from megallama.spec.buckets import buckets
from megallama.spec.grid import ALONE, Grid, Place
from megallama.spec.parameters import EMBEDDING, parameter_table
from megallama.spec.schedules.build import NAMES, make_schedule
from megallama.spec.shards import shard_table
from megallama.spec.stages import (
    Chunk,
    chunk_parameters,
    chunks_of,
    has_tied_copy,
    owners_of,
    rank_tables,
    split_model,
)
from tests.unit.spec.pipelines import CHUNKS, run


def counts(model: Model, parallel: Parallel, chunks: int, length: int = 64) -> list[int]:
    return [len(chunk.layers) for chunk in split_model(model, parallel, chunks, length)]


def cost_of(split: tuple[int, ...], model: Model, length: int) -> int:
    """The largest chunk's FLOPs a token, GEMM by GEMM: the forward two a weight, the backward four.

    The embedding's 14 bytes an element at 153 FLOPs a byte.
    """
    d, keys = model.d_model, model.kv_heads * model.head_width
    layer = 6 * (2 * d * d + 2 * d * keys + 3 * d * model.ffn) + 6 * d * length
    costs = [layer * layers for layers in split]
    costs[0] += 14 * 153 * d
    costs[-1] += 6 * model.vocab * d
    return max(costs)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Model, int, int]:
    """A model whose head costs from nothing to several layers, and a number of chunks."""
    layers = draw(st.integers(1, 12))
    shape = {"d_model": 16, "heads": 4, "kv_heads": draw(st.sampled_from([1, 2, 4]))}
    vocab = draw(st.integers(1, 8000))
    model = Model(layers=layers, ffn=draw(st.integers(1, 200)), vocab=vocab, **shape)
    return model, draw(st.integers(1, min(5, layers))), draw(st.integers(1, 300))


@given(problems())
@settings(deadline=None)
def test_no_split_has_a_cheaper_dearest_chunk(problem):
    model, chunks, length = problem
    found = counts(model, Parallel(), chunks, length)
    every = [
        tuple(b - a for a, b in pairwise((0, *cuts, model.layers)))
        for cuts in combinations(range(1, model.layers), chunks - 1)
    ]
    assert tuple(found) in every
    assert cost_of(tuple(found), model, length) == min(cost_of(s, model, length) for s in every)


@given(problems(), st.sampled_from(["cost", "even"]))
@settings(deadline=None)
def test_chunks_are_runs_of_layers_with_the_ends_at_the_ends(problem, how):
    model, chunks, length = problem
    found = split_model(model, Parallel(stage_layers=how), chunks, length)
    assert [layer for chunk in found for layer in chunk.layers] == list(range(model.layers))
    assert all(chunk.layers for chunk in found)
    assert [chunk.index for chunk in found] == list(range(chunks))
    assert [chunk.embedding for chunk in found] == [True] + [False] * (chunks - 1)
    assert [chunk.head for chunk in found] == [False] * (chunks - 1) + [True]


@given(problems())
@settings(deadline=None)
def test_even_is_even_in_layers(problem):
    model, chunks, _ = problem
    found = counts(model, Parallel(stage_layers="even"), chunks)
    assert max(found) - min(found) <= 1


@pytest.mark.parametrize(
    "layers, chunks, expected",
    [
        (8, 4, [2, 2, 2, 2]),
        (9, 4, [2, 2, 3, 2]),
        (10, 4, [2, 3, 3, 2]),
        (11, 4, [3, 3, 3, 2]),
        (3, 2, [2, 1]),
        (5, 1, [5]),
    ],
)
def test_spare_layers_go_to_the_middle_late_first(layers, chunks, expected):
    model = Model(d_model=16, layers=layers, heads=4, ffn=20, vocab=9)
    assert counts(model, Parallel(stage_layers="even"), chunks) == expected


def test_8b_by_hand():
    """6·128256·4096 = 3.15e9 FLOPs of the head are 2.09 layers of 6·(2.5·4096² + 3·4096·14336) +
    6·4096·8192 = 1.51e9: 34.09 layers' worth over four chunks, 8.52 each. No chunk may stay below
    9 layers' worth, and 9 is enough: the embedding makes 9 of the first too many."""
    model = Model(preset="llama3-8b")
    assert counts(model, Parallel(), 4, 8192) == [8, 9, 9, 6]
    assert counts(model, Parallel(stage_layers="even"), 4, 8192) == [8, 8, 8, 8]


def test_a_list_is_taken_as_it_is():
    model = Model(d_model=16, layers=8, heads=4, ffn=20, vocab=9)
    chunks = split_model(model, Parallel(stage_layers=(1, 5, 2)), 3, 8)
    assert chunks == (
        Chunk(0, range(0, 1), embedding=True, head=False),
        Chunk(1, range(1, 6), embedding=False, head=False),
        Chunk(2, range(6, 8), embedding=False, head=True),
    )


@given(problems(), st.booleans())
@settings(deadline=None)
def test_chunks_have_each_parameter_once_in_the_table_s_order(problem, tied):
    model, chunks, length = problem
    model = model.model_copy(update={"tie_embeddings": tied})
    found = [chunk_parameters(model, c) for c in split_model(model, Parallel(), chunks, length)]
    assert [parameter for table in found for parameter in table] == list(parameter_table(model))


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_owners_are_the_schedule_s(schedule, stages):
    asked = run(schedule=schedule, pipeline=stages)
    assert asked.parallel.chunks_per_rank == CHUNKS[schedule] == default_virtual_stages(schedule)
    made = make_schedule(schedule, stages, 3, CHUNKS[schedule])
    assert owners_of(asked, Grid(pipeline=stages)) == made.owners


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("schedule", NAMES)
def test_ranks_own_the_model_once(schedule, tied):
    """Every element of every part has one owner over tensor, data and pipeline ranks."""
    asked = run({"tie_embeddings": tied}, schedule=schedule, pipeline=4, tensor=4)
    grid = Grid(tensor=4, data=3, pipeline=4)
    owned: Counter[str] = Counter()
    for rank in range(grid.size):
        for _, table in rank_tables(asked, Place(grid, rank)):
            for shard in table:
                for piece in shard.own_pieces:
                    owned[piece.part.name] += piece.owned * prod(piece.shape)
    parts = (part for parameter in parameter_table(asked.model) for part in parameter.parts)
    assert owned == {part.name: part.numel for part in parts}


@pytest.mark.parametrize("schedule", NAMES)
def test_a_rank_s_chunks_are_ascending_and_their_tables_those_of_its_place(schedule):
    asked = run(schedule=schedule, pipeline=2, tensor=2)
    grid = Grid(tensor=2, data=2, pipeline=2)
    chunks = chunks_of(asked, grid)
    for rank in range(grid.size):
        place = Place(grid, rank)
        mine = [i for i, o in enumerate(owners_of(asked, grid)) if o == place.along("pipeline")]
        tables = rank_tables(asked, place)
        assert [chunk.index for chunk, _ in tables] == mine
        for chunk, table in tables:
            assert chunk == chunks[chunk.index]
            assert table == shard_table(chunk_parameters(asked.model, chunk), place)


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_tied_embedding_has_a_copy_where_the_head_is_on_another_rank(schedule, stages):
    """zb-v has both ends of the model on rank 0, and one process has both too."""
    asked = run({"tie_embeddings": True}, schedule=schedule, pipeline=stages, tensor=2)
    grid = Grid(tensor=2, data=3, pipeline=stages)
    apart = stages > 1 and schedule != "zb-v"
    assert has_tied_copy(asked, grid) == apart
    holders = []
    for stage in range(stages):
        place = Place(grid, grid.rank(dict(tensor=1, context=0, data=2, pipeline=stage)))
        for chunk, table in rank_tables(asked, place):
            for shard in table:
                if shard.name == EMBEDDING:
                    holders.append((stage, chunk, table, shard))
    assert len(holders) == 1 + apart
    stage, chunk, table, original = holders[0]
    assert (stage, chunk.embedding, table[0]) == (0, True, original)
    assert all(piece.owned for piece in original.pieces)
    for stage, chunk, table, copy in holders[1:]:
        assert (stage, chunk.head, table[-1]) == (stages - 1, True, copy)
        assert (copy.shape, copy.own_rows) == (original.shape, original.own_rows)
        for pieces, others in (
            (copy.pieces, original.pieces),
            (copy.own_pieces, original.own_pieces),
        ):
            assert not any(piece.owned for piece in pieces)
            assert [(p.part, p.start, p.shape, p.row, p.copies) for p in pieces] == [
                (p.part, p.start, p.shape, p.row, p.copies) for p in others
            ]


def test_one_pipeline_rank_may_have_several_chunks():
    asked = run(schedule="interleaved", virtual_stages=4, stage_layers=[1, 2, 2, 3])
    layers = [list(chunk.layers) for chunk, _ in rank_tables(asked, ALONE)]
    assert layers == [[0], [1, 2], [3, 4], [5, 6, 7]]


def test_a_chunk_without_an_end_has_no_bucket_for_it():
    """The norms come first, with the embedding where the chunk has it."""
    asked = run(pipeline=3, stage_layers=[1, 6, 1])
    grid = Grid(pipeline=3)
    tables = [rank_tables(asked, Place(grid, rank))[0][1] for rank in range(3)]
    first, second, last = (list(buckets([s.parameter for s in table])) for table in tables)
    matrices, norms = ("wqkv", "wo", "w13", "w2"), ("attention_norm", "ffn_norm")
    assert second == [
        tuple(f"layers.{i}.{name}" for i in range(1, 7) for name in norms),
        *(tuple(f"layers.{i}.{name}" for name in matrices) for i in range(1, 7)),
    ]
    assert first[0] == ("tok_embeddings", *(f"layers.0.{name}" for name in norms))
    assert last[0] == (*(f"layers.7.{name}" for name in norms), "norm")
    assert last[-1] == ("output",)
    assert (len(first), len(last)) == (2, 3)


def test_the_copy_of_a_tied_embedding_has_the_output_projection_s_bucket():
    asked = run({"tie_embeddings": True}, pipeline=2)
    grid = Grid(pipeline=2)
    tables = [rank_tables(asked, Place(grid, rank))[0][1] for rank in range(2)]
    first, last = (buckets([s.parameter for s in table]) for table in tables)
    assert first[0][0] == EMBEDDING
    assert last[-1] == (EMBEDDING,)
    assert "norm" in last[0]
