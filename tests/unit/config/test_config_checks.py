"""Values that do not fit together, and remedies that do work."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megallama.config.checks import cross_check
from megallama.config.schedules import VIRTUAL_STAGES


def source(name: str = "a", path: str = "p") -> dict:
    return {"name": name, "path": path, "weight": 1}


@pytest.mark.parametrize(
    "changes, lines",
    [
        (
            {"model.heads": 12, "model.d_model": 128},
            ["model.heads=12: does not divide model.d_model=128; the nearest that fits is 8 or 16"],
        ),
        (
            {"model.heads": 64},
            [
                "model.heads=64: gives heads of odd width 1, and RoPE turns pairs; "
                "the nearest that fits is 32"
            ],
        ),
        (
            {"model.d_model": 63, "model.heads": 7},
            [
                "model.heads=7: gives heads of odd width 9, and RoPE turns pairs; "
                "make model.d_model even"
            ],
        ),
        (
            {"model.kv_heads": 3},
            ["model.kv_heads=3: does not divide model.heads=4; the nearest that divides is 2 or 4"],
        ),
        (
            {"model.kv_heads": 8},
            ["model.kv_heads=8: does not divide model.heads=4; the nearest that divides is 4"],
        ),
        (
            {"model.heads": 8, "model.kv_heads": 4, "model.ffn": 98, "parallel.tensor": 4},
            ["parallel.tensor=4: does not divide model.ffn=98; the nearest that divides is 2 or 7"],
        ),
        (
            {"parallel.tensor": 8},
            ["parallel.tensor=8: does not divide model.heads=4; the nearest that divides is 4"],
        ),
        (
            {
                "model.d_model": 48,
                "model.heads": 12,
                "model.kv_heads": 6,
                "parallel.tensor": 4,
            },
            [
                "parallel.tensor=4: neither divides model.kv_heads=6 nor is a multiple of it; "
                "the nearest that fits is 3 or 6"
            ],
        ),
        (
            {"train.sequence_length": 31, "parallel.tensor": 4, "train.micro_batch": 2},
            [
                "train.sequence_length=31: is not a multiple of parallel.tensor=4; the nearest "
                "that fits is 28 or 32, or set parallel.sequence_parallel=false"
            ],
        ),
        (
            {"train.sequence_length": 28, "parallel.tensor": 4, "parallel.overlap": "full"},
            [
                "train.sequence_length=28: is not a multiple of parallel.tensor=4 x the 2 chunks "
                "of parallel.overlap=full; the nearest that fits is 24 or 32, "
                "or set parallel.sequence_parallel=false"
            ],
        ),
        (
            {
                "train.sequence_length": 31,
                "parallel.tensor": 4,
                "parallel.overlap": "full",
                "parallel.sequence_parallel": False,
            },
            [
                "train.sequence_length=31: is not a multiple of the 2 chunks of "
                "parallel.overlap=full; the nearest that fits is 30 or 32"
            ],
        ),
        (
            {"train.micro_batch": 3},
            [
                "train.global_batch=8: is not a multiple of train.micro_batch=3; "
                "the nearest that fits is 6 or 9"
            ],
        ),
        (
            {"train.micro_batch": 4, "parallel.data": 3},
            [
                "train.global_batch=8: is not a multiple of train.micro_batch=4 x parallel.data=3; "
                "the nearest that fits is 12"
            ],
        ),
        (
            {"train.tokens": 10**9},
            ["train.steps=1000: given with train.tokens=1000000000; set one to null"],
        ),
        (
            {"train.steps": None},
            ["train.steps: is missing, and so is train.tokens; set one of them"],
        ),
        (
            {"optimizer.min_lr": 1},
            [
                "optimizer.min_lr=1.0: is above optimizer.lr=0.001; "
                "give at most 0.001, or leave it out for a tenth of that"
            ],
        ),
        (
            {
                "model.rope_scaling": {
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                    "original_context": 8192,
                }
            },
            [
                "model.rope_scaling.high_freq_factor=4.0: is not above low_freq_factor=4.0; "
                "Llama 3.1 has 4 above 1"
            ],
        ),
        (
            {"optimizer.schedule": "wsd"},
            [
                "optimizer.schedule=wsd: needs optimizer.decay_steps; set it to the length of the "
                "final decay, such as a tenth of the run's steps"
            ],
        ),
        (
            {"optimizer.decay_steps": 10},
            [
                "optimizer.decay_steps=10: is not used by optimizer.schedule=cosine; "
                "remove it or use the wsd schedule"
            ],
        ),
        (
            {"optimizer.schedule": "wsd", "optimizer.decay_steps": 1001},
            ["optimizer.decay_steps=1001: exceeds the run's 1000 steps; give at most 1000"],
        ),
        (
            {
                "train.steps": None,
                "train.tokens": 256 * 99 + 1,
                "optimizer.schedule": "wsd",
                "optimizer.decay_steps": 101,
            },
            ["optimizer.decay_steps=101: exceeds the run's 100 steps; give at most 100"],
        ),
        (
            {"data.mixture": [source()], "data.phases": [{"mixture": [source()]}]},
            ["data.phases (of 1): given with data.mixture; remove one of them"],
        ),
        (
            {"data.mixture": [source(), source(path="q"), source("b")]},
            ["data.mixture.name=a: names 2 sources; give each source a name of its own"],
        ),
        (
            {
                "data.phases": [
                    {"until_tokens": 5, "mixture": [source()]},
                    {"mixture": [source("b"), source(path="q")]},
                ]
            },
            [
                "data.phases.1.mixture.a.path=q: the same source is at p in an earlier phase; "
                "give it that path or another name"
            ],
        ),
        (
            {
                "data.phases": [
                    {"until_tokens": 5, "mixture": [source()]},
                    {"until_tokens": 5, "mixture": [source()]},
                    {"mixture": [source()]},
                ]
            },
            [
                "data.phases.1.until_tokens=5: is not above the phase before it, which ends at 5; "
                "put the phases in order: each counts tokens from the start of the run"
            ],
        ),
        (
            {"data.phases": [{"mixture": [source()]}, {"mixture": [source()]}]},
            [
                "data.phases.0.until_tokens: is missing, and other phases follow; "
                "set it: the last phase alone may go without"
            ],
        ),
    ],
)
def test_contradictions(faults, changes, lines):
    assert faults(changes) == lines


def numbers(remedy: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", remedy.split(", or set")[0])]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_number_in_a_remedy_is_a_remedy(data):
    """Whatever divides or does not: taking any number that is offered removes the fault."""
    size = st.integers(1, 48)
    key, others = data.draw(
        st.sampled_from(
            [
                ("model.heads", ["model.d_model"]),
                ("model.kv_heads", ["model.heads"]),
                ("parallel.tensor", ["model.heads"]),
                ("parallel.tensor", ["model.kv_heads"]),
                ("parallel.tensor", ["model.ffn"]),
                ("train.global_batch", ["train.micro_batch", "parallel.data"]),
                ("train.sequence_length", ["parallel.tensor"]),
            ]
        )
    )
    valid = {name: data.draw(size) for name in (key, *others)}
    valid["parallel.sequence_parallel"] = data.draw(st.booleans())
    valid["parallel.overlap"] = data.draw(st.sampled_from(["none", "backward", "full"]))
    found = list(cross_check(valid))
    assume(found)
    assert len(found) == 1
    offered = numbers(found[0].remedy)
    assert offered or "even" in found[0].remedy
    assert valid[key] not in offered
    for number in offered:
        assert not list(cross_check({**valid, key: number}))


def length_faults(length, tensor, sequence_parallel, overlap):
    return list(
        cross_check(
            {
                "train.sequence_length": length,
                "parallel.tensor": tensor,
                "parallel.sequence_parallel": sequence_parallel,
                "parallel.overlap": overlap,
            }
        )
    )


@pytest.mark.parametrize("overlap", ["none", "backward"])
def test_without_sequence_parallel_any_length_goes(overlap):
    assert length_faults(31, 4, True, overlap)
    assert not length_faults(31, 4, False, overlap)


@given(
    st.integers(1, 64),
    st.integers(1, 8),
    st.booleans(),
    st.sampled_from(["none", "backward", "full"]),
)
@settings(deadline=None)
def test_the_tensor_ranks_and_the_chunks_divide_the_sequence(length, tensor, sequential, overlap):
    """Validation takes samples one by one, so the micro-batch does not help."""
    ranks = tensor if sequential else 1
    chunks = 2 if overlap == "full" and tensor > 1 else 1
    assert bool(length_faults(length, tensor, sequential, overlap)) == bool(
        length % (ranks * chunks)
    )


def test_doing_without_sequence_parallel_is_offered_only_where_it_helps():
    for overlap, length in itertools.product(("none", "backward", "full"), range(1, 33)):
        for fault in length_faults(length, 4, True, overlap):
            offered = "parallel.sequence_parallel=false" in fault.remedy
            assert offered == (not length_faults(length, 4, False, overlap)), (overlap, length)


def test_a_check_waits_for_its_values():
    assert not list(cross_check({"model.heads": 7}))


@pytest.mark.parametrize(
    "changes, lines",
    [
        (
            {"parallel.pipeline": 3},
            [
                "parallel.pipeline=3: x 1 chunk on a rank exceeds model.layers=2, and a chunk has "
                "one layer or more; the nearest that fits is 2"
            ],
        ),
        (
            {"parallel.pipeline": 2, "parallel.schedule": "interleaved"},
            [
                "parallel.pipeline=2: x 2 chunks on a rank exceeds model.layers=2, and a chunk has "
                "one layer or more; the nearest that fits is 1"
            ],
        ),
        (
            {"parallel.virtual_stages": 3, "parallel.schedule": "interleaved"},
            [
                "parallel.pipeline=1: x 3 chunks on a rank exceeds model.layers=2, and a chunk has "
                "one layer or more; raise model.layers to 3, or have fewer chunks on a rank"
            ],
        ),
        (
            {"parallel.virtual_stages": 2},
            [
                "parallel.virtual_stages=2: parallel.schedule=1f1b takes 1; "
                "leave it out, or set parallel.schedule=interleaved"
            ],
        ),
        (
            {"parallel.virtual_stages": 2, "parallel.schedule": "1f1b-fused"},
            [
                "parallel.virtual_stages=2: parallel.schedule=1f1b-fused takes 1; "
                "leave it out, or set parallel.schedule=interleaved-fused"
            ],
        ),
        (
            {"parallel.virtual_stages": 1, "parallel.schedule": "zb-v"},
            [
                "parallel.virtual_stages=1: parallel.schedule=zb-v takes 2; "
                "leave it out, or set parallel.schedule=interleaved"
            ],
        ),
        (
            {"parallel.pipeline": 2, "parallel.stage_layers": [2]},
            [
                "parallel.stage_layers=[2]: has 1 entry for 2 chunks; "
                "give 2 that sum to 2, or use cost or even",
            ],
        ),
        (
            {"model.layers": 11, "parallel.pipeline": 3, "parallel.stage_layers": [3, 3, 4]},
            [
                "parallel.stage_layers=[3, 3, 4]: sums to 10, not model.layers=11; "
                "give 3 that sum to 11, or use cost or even"
            ],
        ),
        (
            {"parallel.stage_layers": [1, 1]},
            [
                "parallel.stage_layers=[1, 1]: has 2 entries for 1 chunk; "
                "give 1 that sum to 2, or use cost or even"
            ],
        ),
    ],
)
def test_contradictions_of_a_pipeline(faults, changes, lines):
    assert faults(changes) == lines


pipelines = st.fixed_dictionaries(
    {
        "model.layers": st.integers(1, 12),
        "parallel.pipeline": st.integers(1, 5),
        "parallel.schedule": st.sampled_from(list(VIRTUAL_STAGES)),
        "parallel.virtual_stages": st.none() | st.integers(1, 4),
        "parallel.stage_layers": st.sampled_from(["cost", "even"])
        | st.lists(st.integers(1, 4), min_size=1, max_size=6).map(tuple),
    }
)


@given(pipelines)
@settings(max_examples=300, deadline=None)
def test_the_pipelines_that_are_refused_are_those_that_no_run_can_take(valid):
    layers, pipeline = valid["model.layers"], valid["parallel.pipeline"]
    schedule, virtual = valid["parallel.schedule"], valid["parallel.virtual_stages"]
    split = valid["parallel.stage_layers"]
    takes = VIRTUAL_STAGES[schedule]
    chunks = pipeline * (virtual or takes or 2)
    wrong = {
        "parallel.virtual_stages": virtual is not None and takes not in (None, virtual),
        "parallel.pipeline": chunks > layers,
        "parallel.stage_layers": chunks <= layers
        and not isinstance(split, str)
        and (len(split), sum(split)) != (chunks, layers),
    }
    found = {fault.subject.partition("=")[0]: fault for fault in cross_check(valid)}
    assert set(found) == {key for key, is_wrong in wrong.items() if is_wrong}
    if "parallel.pipeline" in found and "nearest" in found["parallel.pipeline"].remedy:
        (fits,) = numbers(found["parallel.pipeline"].remedy)
        again = cross_check({**valid, "parallel.pipeline": fits, "parallel.stage_layers": "cost"})
        assert "parallel.pipeline" not in {fault.subject.partition("=")[0] for fault in again}
    if "parallel.stage_layers" in found:
        assert numbers(found["parallel.stage_layers"].remedy) == [chunks, layers]
