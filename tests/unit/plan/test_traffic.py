"""What a predicted step sends is what `spec.traffic` says that a step sends, group by group."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.config.schedules import VIRTUAL_STAGES
from megallama.config.schema import Config
from megallama.plan.ops import Collective, Start
from megallama.plan.passtimes import issued
from megallama.plan.rundown import Rundown
from megallama.spec.collectives import NOTHING, Traffic
from megallama.spec.grid import Grid, Place
from megallama.spec.replicas import comparison_traffic
from megallama.spec.schedules.build import NAMES
from megallama.spec.traffic import step_traffic
from tests.unit.plan.machines import A100, changed, config

Sizes = Counter[tuple[str, str]]


def predicted(rundown: Rundown, rank: int) -> Sizes:
    """Bytes by group and operation of a pipeline rank's predicted step."""
    plan, parts, end = rundown.plan(rundown.micro_batches), rundown.parts, rundown.end
    found: list[tuple[int, Collective]] = []
    for (kind, first, second), times in plan.work[rank].items():
        steps = issued(rundown.shape, kind, parts[first], parts[second])
        found += [(times, step.collective) for step in steps if isinstance(step, Start)]
    mine = rundown.rank_parts(rank)
    for bucket in (bucket for part in mine for bucket in end.buckets(part).all):
        found += [(1, end.gather(bucket)), (1, end.reduce(bucket))]
    found += [(1, one) for one in end.reductions(mine)]
    sizes = sizes_of(found)
    message = rundown.shape.stream(rundown.shape.rows)
    for node in plan.nodes:
        for maker, _ in node.takes:
            if plan.nodes[maker].rank == rank:
                sizes[f"pipeline {rank}>{node.rank}", "send"] += message
    return sizes


def sizes_of(found: list[tuple[int, Collective]]) -> Sizes:
    sizes: Sizes = Counter()
    for times, one in found:
        sizes[one.group, one.operation] += times * one.bytes
    return +sizes


def largest(traffic: list[Traffic]) -> Sizes:
    """Of ranks that differ in rows alone: each operation's largest."""
    sizes: Sizes = Counter()
    for one in traffic:
        for key, count in one.counts.items():
            sizes[key] = max(sizes[key], count.bytes)
    return +sizes


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Config, Grid]:
    grid = Grid(draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 3, 8])),
                draw(st.sampled_from([1, 2, 3])))  # fmt: skip
    schedule = draw(st.sampled_from(NAMES))
    values = {
        "parallel__tensor": grid.tensor,
        "parallel__pipeline": grid.pipeline,
        "parallel__data": grid.data,
        "parallel__schedule": schedule,
        "parallel__overlap": draw(st.sampled_from(["none", "backward", "full"])),
        "parallel__sequence_parallel": draw(st.booleans()),
        "parallel__gradient_wire": draw(st.sampled_from(["fp32", "bf16"])),
        "parallel__early_step": draw(st.booleans()),
        "train__micro_batch": 2,
        "train__global_batch": 2 * grid.data * 3 * grid.pipeline,
        "train__sequence_length": 16,
        "train__saved_activations": draw(st.sampled_from(["linear_outputs", "layer_input"])),
        "train__precision": draw(st.sampled_from(["bf16", "fp32"])),
        "model__tie_embeddings": draw(st.booleans()),
        "model__kv_heads": draw(st.sampled_from([1, 2, 4])),
        "model__layers": 8,
        "model__vocab": draw(st.sampled_from([64, 61])),
    }
    if VIRTUAL_STAGES[schedule] is None and grid.pipeline > 1:
        values["parallel__virtual_stages"] = 2
    return tiny(**values), grid


def tiny(**values: object) -> Config:
    shape = {"d_model": 24, "heads": 4, "ffn": 40}
    return config(**{f"model__{key}": value for key, value in shape.items()} | values)


def seats(grid: Grid, pipeline: int) -> list[Place]:
    """The places of a pipeline rank."""
    places = (Place(grid, rank) for rank in range(grid.size))
    return [place for place in places if place.along("pipeline") == pipeline]


@given(layouts())
@settings(max_examples=60, deadline=None)
def test_every_group_s_bytes_are_in_the_predicted_step(drawn):
    one, grid = drawn
    rundown = Rundown(one, A100, grid)
    for rank in range(grid.pipeline):
        said = largest([step_traffic(one, place, "cuda") for place in seats(grid, rank)])
        assert predicted(rundown, rank) == said
        compared = [comparison_traffic(one, place) for place in seats(grid, rank)]
        found = rundown.end.comparisons(rundown.rank_parts(rank))
        assert sizes_of([(1, c) for c in found]) == largest(compared)


def end_seconds(**values: object) -> float:
    """From the last gradient to the verdict, on four tensor ranks, two data and two pipeline."""
    grid = Grid(4, 2, 2)
    one = tiny(model__vocab=4096, parallel__tensor=4, parallel__pipeline=2, **values)
    rundown = Rundown(one, changed(A100, {"network.bandwidth": 1e-6, "node.bandwidth": 1e-6}), grid)
    return rundown.end.sums(rundown.rank_parts(0))


@pytest.mark.parametrize(
    "more",
    [{"model__tie_embeddings": True}, {"model__kv_heads": 1}, {"parallel__early_step": True}],
)
def test_each_of_them_takes_time(more):
    plain = {"model__layers": 2, "train__check_replicas_every": 0}
    assert end_seconds(**plain | more) > end_seconds(**plain)


def test_a_comparison_counts_for_its_share_of_a_step():
    never, often, seldom = (
        end_seconds(model__layers=2, train__check_replicas_every=n) for n in (0, 1, 4)
    )
    assert often > never
    assert seldom - never == pytest.approx((often - never) / 4)


def test_nothing_is_compared_with_nobody():
    assert Rundown(tiny(model__layers=2), A100, Grid()).end.comparisons([]) == []
    assert comparison_traffic(tiny(model__layers=2), Place(Grid(), 0)) == NOTHING
