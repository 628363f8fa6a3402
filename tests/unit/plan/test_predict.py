"""Whole steps: what a prediction adds up to, what more bandwidth does, what the timeline shows."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.config.schedules import VIRTUAL_STAGES
from megallama.errors import ConfigError
from megallama.plan.predict import GROUPS, parameter_count, predict
from megallama.plan.rundown import Rundown
from megallama.plan.spans import spans
from megallama.spec.buckets import buckets
from megallama.spec.flops import flops_per_token
from megallama.spec.grid import Grid, Place
from megallama.spec.parameters import parameter_table
from megallama.spec.schedules.build import NAMES
from megallama.spec.stages import rank_tables
from megallama.spec.traffic import gathered_weights, reduced_gradients
from tests.unit.plan.machines import A100, changed, config

LAYOUTS = {
    "alone": (1, {}),
    "data": (8, {}),
    "tensor": (16, {"parallel__tensor": 8, "parallel__overlap": "full"}),
    "pipeline": (16, {"parallel__pipeline": 4, "train__micro_batch": 1}),
    "all": (64, {"parallel__tensor": 4, "parallel__pipeline": 2, "train__micro_batch": 2}),
    "none": (64, {"parallel__tensor": 4, "parallel__pipeline": 2, "parallel__overlap": "none"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_is_what_it_is_made_of(name):
    gpus, values = LAYOUTS[name]
    one = config(**values)
    found = predict(one, A100, gpus)
    assert tuple(found.exposed) == GROUPS
    assert all(seconds >= -1e-12 for seconds in found.exposed.values())
    total = found.compute_seconds + sum(found.exposed.values())
    assert found.step_seconds == pytest.approx(total)
    tokens = one.train.global_batch * one.train.sequence_length
    assert found.tokens_per_second_per_gpu == pytest.approx(tokens / found.step_seconds / gpus)
    flops = flops_per_token(one.model, 2048)
    assert found.mfu == pytest.approx(found.tokens_per_second_per_gpu * flops / 312e12)
    assert 0.1 < found.mfu < 271 / 312
    # Kernels cannot take less than their FLOPs at the rate of a large product.
    assert found.compute_seconds > tokens * flops / gpus / 271e12


def test_what_is_not_there_takes_no_time():
    alone = predict(config(), A100, 1).exposed
    assert {k for k, v in alone.items() if v > 1e-9} == {"step_sum", "optimizer"}
    assert predict(config(parallel__tensor=2), A100, 2).exposed["tensor"] > 0
    assert predict(config(), A100, 2).exposed["data"] > 0
    pipeline = predict(config(parallel__pipeline=2), A100, 2).exposed
    assert pipeline["bubble"] > 0
    assert pipeline["pipeline"] > 0


def test_no_peak_no_utilisation():
    machine = A100.model_copy(update={"gemm": A100.gemm.model_copy(update={"peak": None})})
    found = predict(config(), machine, 1)
    assert found.mfu is None
    assert found.mfu_6n is None


def test_overlap_is_worth_something_and_devices_must_fill_the_grid():
    none, backward, full = (
        predict(config(parallel__tensor=8, parallel__overlap=o, train__micro_batch=4), A100, 8)
        for o in ("none", "backward", "full")
    )
    assert none.step_seconds > backward.step_seconds > full.step_seconds
    with pytest.raises(ConfigError, match="do not make this grid"):
        predict(config(parallel__tensor=8), A100, 12)


def test_parameters_are_counted():
    for preset in ("llama-7b", "llama3-8b"):
        model = config(preset).model
        assert parameter_count(model) == sum(p.numel for p in parameter_table(model))


FASTER = ["node.bandwidth", "network.bandwidth", "memory.bandwidth"]


@given(
    name=st.sampled_from(sorted(LAYOUTS)),
    schedule=st.sampled_from(NAMES),
    faster=st.dictionaries(st.sampled_from(FASTER), st.floats(1.0, 8.0), min_size=1),
    policy=st.sampled_from(["linear_outputs", "no_gate_up", "layer_input"]),
)
@settings(max_examples=60, deadline=None)
def test_more_bandwidth_never_makes_a_step_slower(name, schedule, faster, policy):
    gpus, values = LAYOUTS[name]
    values = {**values, "train__saved_activations": policy, "parallel__schedule": schedule}
    if VIRTUAL_STAGES[schedule] is None:
        values["parallel__virtual_stages"] = 2
    one = config(**values)
    before = predict(one, A100, gpus).step_seconds
    assert predict(one, changed(A100, faster), gpus).step_seconds <= before * (1 + 1e-9)


@pytest.mark.parametrize("preset", ["llama-7b", "llama2-70b"])
@pytest.mark.parametrize("wire", ["fp32", "bf16"])
def test_buckets_are_those_of_the_traffic(wire, preset):
    grid = Grid(tensor=8, data=12, pipeline=2)
    one = config(
        preset,
        parallel__tensor=8,
        parallel__pipeline=2,
        parallel__gradient_wire=wire,
        train__global_batch=48,
    )
    rundown = Rundown(one, A100, grid)
    for rank in range(2):
        place = Place(grid, grid.group("pipeline", 0)[rank])
        ((chunk, table),) = rank_tables(one, place)
        found = rundown.end.buckets(rundown.parts[chunk.index]).all
        own = {shard.name: prod(shard.own_shape) for shard in table}
        names = buckets([shard.parameter for shard in table])
        assert [b.own for b in found] == [sum(own[n] for n in each) for each in names]
        assert [b.tensors for b in found] == list(map(len, names))
        (gathers,) = gathered_weights(table, 12, 2).counts.values()
        (reduces,) = reduced_gradients(table, 12, 4 if wire == "fp32" else 2).counts.values()
        assert sum(rundown.end.gather(b).bytes for b in found) == gathers.bytes
        assert sum(rundown.end.reduce(b).bytes for b in found) == reduces.bytes


@pytest.mark.parametrize("schedule", NAMES)
def test_the_timeline_is_the_prediction(schedule):
    """Spans of a lane follow each other; the last one ends with the step."""
    values = {"parallel__pipeline": 4, "parallel__schedule": schedule, "parallel__tensor": 2}
    if VIRTUAL_STAGES[schedule] is None:
        values["parallel__virtual_stages"] = 4
    one = config(**values, train__global_batch=96)
    found = spans(one, A100, 16)
    lanes = defaultdict(list)
    for span in found:
        assert 0 <= span.start < span.end
        lanes[span.rank, span.lane].append(span)
    for each in lanes.values():
        each.sort(key=lambda span: span.start)
        for one_span, following in pairwise(each):
            assert one_span.end <= following.start + 1e-9
    assert {lane for _, lane in lanes} >= {"compute", "kernels", "tensor", "data", "world"}
    assert any(lane.startswith("pipeline") for _, lane in lanes)
    end = max(span.end for span in found)
    assert end == pytest.approx(predict(one, A100, 16).step_seconds, rel=2e-3)
