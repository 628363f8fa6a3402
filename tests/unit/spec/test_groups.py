"""Groups of pipelines, written out and by what all ranks must agree on."""

from __future__ import annotations

import pytest

from megallama.spec.grid import Grid, Place
from megallama.spec.groups import group_members, run_schedule
from megallama.spec.schedules.build import NAMES, make_schedule
from tests.unit.spec.pipelines import CHUNKS, run


def members(config, grid, rank):
    return group_members(config, Place(grid, rank), run_schedule(config, grid).links)


def test_a_2x2x2_written_out():
    """Ranks count along tensor, data, pipeline: rank 3 is tensor 1, data 1, and 7 its peer."""
    asked, grid = run({"tie_embeddings": True}, tensor=2, pipeline=2), Grid(2, 2, 2)
    common = {"world": tuple(range(8)), "key_value": (3,), "tensor": (2, 3), "data": (1, 3)}
    links = {"pipeline 0>1": (3, 7), "pipeline 1>0": (7, 3), "tied": (3, 7)}
    assert members(asked, grid, 3) == common | links
    common |= {"key_value": (7,), "tensor": (6, 7), "data": (5, 7)}
    assert members(asked, grid, 7) == common | links


def test_a_line_a_ring_and_a_v():
    """Activations go up and gradients down; from an interleaved pipeline's last rank to its first
    too, and the other way; in a V both go both ways, between neighbours."""

    def pipes(schedule, rank, **model):
        asked = run(model, schedule=schedule, pipeline=4)
        return {
            name.removeprefix("pipeline "): ranks
            for name, ranks in members(asked, Grid(pipeline=4), rank).items()
            if name not in ("world", "tensor", "key_value", "data")
        }

    line = {"0>1": (0, 1), "1>0": (1, 0), "1>2": (1, 2), "2>1": (2, 1)}
    ends = {"0>1": (0, 1), "1>0": (1, 0)}
    assert pipes("1f1b", 1) == pipes("zb-v", 1) == pipes("interleaved", 1) == line
    assert pipes("1f1b", 0) == pipes("zb-v", 0) == ends
    assert pipes("interleaved", 0) == ends | {"3>0": (3, 0), "0>3": (0, 3)}
    assert pipes("1f1b", 0, tie_embeddings=True) == ends | {"tied": (0, 3)}
    assert pipes("1f1b", 1, tie_embeddings=True) == line
    assert pipes("zb-v", 0, tie_embeddings=True) == ends


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("schedule", NAMES)
def test_members_name_a_group_alike(schedule, tied):
    """And every link that the schedule needs is there, at each place of the other axes."""
    asked = run({"tie_embeddings": tied}, schedule=schedule, tensor=2, pipeline=3)
    grid = Grid(tensor=2, data=2, pipeline=3)
    by_rank = [members(asked, grid, rank) for rank in range(grid.size)]
    for rank, mine in enumerate(by_rank):
        for name, ranks in mine.items():
            assert rank in ranks
            assert len(set(ranks)) == len(ranks)
            assert all(by_rank[other][name] == ranks for other in ranks)
        here = grid.coordinates(rank)
        for source, destination in run_schedule(asked, grid).links:
            pair = tuple(grid.rank(here | {"pipeline": end}) for end in (source, destination))
            held = mine.get(f"pipeline {source}>{destination}")
            assert held == (pair if rank in pair else None)


@pytest.mark.parametrize("schedule", NAMES)
def test_the_schedule_of_a_run(schedule):
    """24 samples, one a micro-batch, over 3 data ranks: 8 micro-batches in each pipeline."""
    asked, grid = run(schedule=schedule, pipeline=2), Grid(data=3, pipeline=2)
    assert run_schedule(asked, grid) == make_schedule(schedule, 2, 8, CHUNKS[schedule])
    assert run_schedule(asked, grid, 5) == make_schedule(schedule, 2, 5, CHUNKS[schedule])


def test_one_pipeline_rank_may_run_a_pipeline_s_schedule():
    asked = run(schedule="zb-v")
    assert run_schedule(asked, Grid(data=4)) == make_schedule("zb-v", 1, 6, 2)
