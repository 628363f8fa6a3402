"""The rank grid: who stands where, who shares a group, and the jobs that make no grid."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.config.load import parse_config
from megallama.config.schema import Config
from megallama.errors import ConfigError
from megallama.spec.grid import ALONE, AXES, Grid, Place, make_grid

sizes = st.integers(1, 5)
grids = st.builds(Grid, tensor=sizes, data=sizes, pipeline=sizes, context=st.integers(1, 2))


@given(grids)
@settings(deadline=None)
def test_ranks_and_coordinates_are_one_to_one(grid):
    places = [grid.coordinates(rank) for rank in range(grid.size)]
    assert [grid.rank(place) for place in places] == list(range(grid.size))
    assert len({tuple(place.items()) for place in places}) == grid.size
    for place in places:
        assert tuple(place) == AXES
        assert all(0 <= place[axis] < n for axis, n in zip(AXES, grid.sizes, strict=True))


def test_the_tensor_axis_is_the_fastest_then_data_then_pipeline():
    """Megatron-LM's order: tp-cp-dp-pp."""
    grid = Grid(tensor=2, data=3, pipeline=2)
    table = [grid.coordinates(rank) for rank in range(12)]
    assert [place["tensor"] for place in table] == [0, 1] * 6
    assert [place["data"] for place in table] == [0, 0, 1, 1, 2, 2] * 2
    assert [place["pipeline"] for place in table] == [0] * 6 + [1] * 6
    with_context = Grid(tensor=2, context=2, data=2)
    assert [with_context.coordinates(rank)["context"] for rank in range(8)] == [0, 0, 1, 1] * 2


def test_groups_written_out():
    """Eight ranks of 2 x 4 with four key/value heads' worth of sharing, as DESIGN counts them."""
    grid = Grid(tensor=4, data=2)
    assert Place(grid, 6).groups(kv_heads=2) == {
        "world": tuple(range(8)),
        "tensor": (4, 5, 6, 7),
        "key_value": (6, 7),
        "data": (2, 6),
    }
    assert grid.group("pipeline", 6) == (6,)
    assert ALONE.groups(kv_heads=1) == dict.fromkeys(("world", "tensor", "key_value", "data"), (0,))


@given(grid=grids, kv_heads=st.sampled_from([1, 2, 3, 4, 8]))
@settings(deadline=None)
def test_groups_of_a_name_partition_the_ranks(grid, kv_heads):
    """Every rank is in one group of each name, and its members all name it alike and in order."""
    everything = set(range(grid.size))
    by_rank = [Place(grid, rank).groups(kv_heads) for rank in range(grid.size)]
    for name in by_rank[0]:
        groups = {mine[name] for mine in by_rank}
        assert sum(map(len, groups)) == grid.size
        assert set().union(*groups) == everything
        for rank, mine in enumerate(by_rank):
            assert rank in mine[name]
            assert list(mine[name]) == sorted(mine[name])
            assert all(by_rank[other][name] == mine[name] for other in mine[name])


@given(grids)
@settings(deadline=None)
def test_ranks_of_a_group_differ_along_its_axis_alone(grid):
    for rank in range(grid.size):
        mine = grid.coordinates(rank)
        for axis in AXES:
            members = [grid.coordinates(other) for other in grid.group(axis, rank)]
            assert [place.pop(axis) for place in members] == list(range(len(members)))
            assert all(place.items() <= mine.items() for place in members)


@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8, 16])
def test_key_value_groups_hold_one_head_each_where_ranks_outnumber_heads(tensor, kv_heads):
    """A head's ranks are neighbours, and the rank's own head is that of its group."""
    grid = Grid(tensor=tensor, data=2)
    sharing = max(1, tensor // kv_heads)
    for rank in range(grid.size):
        place = Place(grid, rank)
        group = place.groups(kv_heads)["key_value"]
        assert len(group) == sharing
        heads = {grid.coordinates(r)["tensor"] * kv_heads // tensor for r in group}
        if sharing > 1:
            assert heads == {place.along("tensor") * kv_heads // tensor}
        assert group == tuple(range(group[0], group[0] + sharing))
        assert set(group) <= set(place.groups(kv_heads)["tensor"])


def test_a_grid_is_shown_rank_by_rank():
    assert str(Grid(tensor=2, data=2)).splitlines() == [
        "rank  pp  dp  tp",
        "   0   0   0   0",
        "   1   0   0   1",
        "   2   0   1   0",
        "   3   0   1   1",
    ]


def config(**parallel: Any) -> Config:
    return parse_config(
        {
            "model": {"d_model": 64, "layers": 2, "heads": 8, "ffn": 96, "vocab": 256},
            "train": {"steps": 1, "sequence_length": 32, "global_batch": 12, "micro_batch": 2},
            "optimizer": {"lr": 1e-3},
            "parallel": parallel,
        }
    )


@pytest.mark.parametrize(
    "parallel, processes, expected",
    [
        ({}, 1, Grid()),
        ({}, 3, Grid(data=3)),
        ({"data": 3}, 3, Grid(data=3)),
        ({"tensor": 2}, 2, Grid(tensor=2)),
        ({"tensor": 4}, 12, Grid(tensor=4, data=3)),
        ({"tensor": 2, "data": 6}, 12, Grid(tensor=2, data=6)),
        ({"pipeline": 2}, 2, Grid(pipeline=2)),
        ({"pipeline": 2}, 6, Grid(data=3, pipeline=2)),
        ({"tensor": 2, "pipeline": 2}, 8, Grid(tensor=2, data=2, pipeline=2)),
        ({"tensor": 2, "pipeline": 2, "data": 3}, 12, Grid(tensor=2, data=3, pipeline=2)),
    ],
)
def test_data_ranks_follow_from_the_processes(parallel, processes, expected):
    assert make_grid(config(**parallel), processes) == expected


@pytest.mark.parametrize(
    "parallel, processes, line",
    [
        (
            {"tensor": 2},
            1,
            "parallel.tensor=2: 1 process does not make this grid; "
            "start 2 (--nproc 2 on one machine), or change the grid",
        ),
        (
            {"tensor": 2},
            5,
            "parallel.tensor=2: 5 processes do not make this grid; "
            "start 4 (--nproc 4 on one machine), or change the grid",
        ),
        (
            {"tensor": 2, "data": 3},
            4,
            "parallel.tensor=2 x parallel.data=3: 4 processes do not make this grid; "
            "start 6 (--nproc 6 on one machine), or change the grid",
        ),
        (
            {"pipeline": 2},
            3,
            "parallel.tensor=1 x parallel.pipeline=2: 3 processes do not make this grid; "
            "start 2 (--nproc 2 on one machine), or change the grid",
        ),
        (
            {"tensor": 2, "pipeline": 2, "data": 3},
            8,
            "parallel.tensor=2 x parallel.pipeline=2 x parallel.data=3: 8 processes do not make "
            "this grid; start 12 (--nproc 12 on one machine), or change the grid",
        ),
        (
            {"pipeline": 2},
            8,
            "train.global_batch=12: is not a multiple of train.micro_batch=2 x 4 data ranks; 16 is",
        ),
        (
            {"tensor": 2},
            8,
            "train.global_batch=12: is not a multiple of train.micro_batch=2 x 4 data ranks; 16 is",
        ),
    ],
)
def test_what_makes_no_grid(parallel, processes, line):
    """One line each: the thing, the value, the way out."""
    with pytest.raises(ConfigError) as caught:
        make_grid(config(**parallel), processes)
    assert str(caught.value) == line
    assert caught.value.exit_code == 78


@given(
    tensor=st.sampled_from([1, 2, 4, 8]),
    pipeline=st.sampled_from([1, 2]),
    data=st.none() | st.integers(1, 6),
    processes=st.integers(1, 24),
)
@settings(deadline=None)
def test_a_grid_has_as_many_ranks_as_there_are_processes_or_is_refused(
    tensor, pipeline, data, processes
):
    def grid():
        return make_grid(config(tensor=tensor, pipeline=pipeline, data=data), processes)

    ranks = data or max(1, processes // (tensor * pipeline))
    if tensor * pipeline * ranks != processes or 12 % (2 * ranks):
        with pytest.raises(ConfigError, match=r"^[^\n]*; [^\n]*$"):
            grid()
        return
    assert grid() == Grid(tensor, ranks, pipeline)
