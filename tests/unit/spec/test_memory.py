"""Bytes on a grid: those of the buffers that rank 0 really makes, and published ones by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megallama.config.load import parse_config
from megallama.config.schema import Config
from megallama.dist.parcels import ALONE
from megallama.kernels.linear_wgrad import SCRATCH
from megallama.optim.adamw import AdamW
from megallama.parallel.state import ALIGNMENT, ParameterState
from megallama.spec.grid import Grid, Place
from megallama.spec.groups import run_schedule
from megallama.spec.memory import PACKED, held_bytes, kept_bytes, peak_layers, rank_bytes
from megallama.spec.parameters import EMBEDDING, OUTPUT, parameter_table
from megallama.spec.saved import saved_bytes, weight_state_bytes
from megallama.spec.schedules.build import NAMES
from megallama.spec.schedules.promises import peak_in_flight, peak_weight_states
from megallama.spec.shards import shard_table
from megallama.spec.stages import rank_tables
from megallama.spec.workspaces import WGRAD_SCRATCH, Device
from megallama.train.device import DTYPES
from tests.unit.optim.trainers import CPU, optimizer_config

#: The ends of the model that a tied weight belongs to.
ENDS = (EMBEDDING, OUTPUT)
GRIDS = [
    Grid(),
    Grid(data=3),
    Grid(tensor=2),
    Grid(tensor=4, data=2),
    Grid(tensor=8, data=5),
]


def config(grid: Grid, precision: str, tied: bool = False, **parallel: Any) -> Config:
    return parse_config(
        {
            "model": {
                "d_model": 32,
                "layers": 2,
                "heads": 8,
                "kv_heads": 2,
                "ffn": 48,
                "vocab": 61,
                "tie_embeddings": tied,
            },
            "train": {
                "steps": 1,
                "sequence_length": 16,
                "global_batch": 2 * grid.data,
                "micro_batch": 2,
                "precision": precision,
            },
            "optimizer": {"lr": 1e-3},
            "parallel": {"tensor": grid.tensor, "data": grid.data, **parallel},
        }
    )


def pipeline(grid: Grid, **keys: Any) -> Config:
    """A run of 12 micro-batches of 32 tokens in each pipeline, over 8 layers."""
    model = {"d_model": 32, "layers": 8, "heads": 8, "kv_heads": 2, "ffn": 48, "vocab": 61}
    model["tie_embeddings"] = keys.pop("tie_embeddings", False)
    train = {"steps": 1, "sequence_length": 16, "global_batch": 24 * grid.data, "micro_batch": 2}
    train["precision"] = keys.pop("precision", "bf16")
    return parse_config(
        {
            "model": model,
            "train": train,
            "optimizer": {"lr": 1e-3},
            "parallel": {"tensor": grid.tensor, "pipeline": grid.pipeline, **keys},
        }
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.tensor}x{g.data}")
def test_they_are_the_buffers_that_a_rank_makes(grid, precision, tied):
    asked = config(grid, precision, tied)
    sizes = held_bytes(asked, grid)
    table = shard_table(parameter_table(asked.model), Place(grid, 0))
    check_buffers(sizes, ParameterState(table, DTYPES[precision], CPU, ENDS if tied else ()))


def check_buffers(sizes: dict[str, int], state: ParameterState) -> None:
    """The sizes are those of the state's buffers and of an optimizer's."""
    optimizer = AdamW(optimizer_config(), state)
    held = state.bytes_held()
    assert {name: sizes[name] for name in held} == held
    assert sizes.get("masters", 0) == held.get("masters", 0)
    moments = (*optimizer.exp_avg.values(), *optimizer.exp_avg_sq.values())
    assert sizes["moments"] == sum(moment.nbytes for moment in moments)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _all(state)}
    kinds = [state.padded_weights, state.padded_gradients]
    kinds += [state.masters] if "masters" in held else []  # else they are views of the weights
    gaps = sum(-tensor.nbytes % ALIGNMENT for kind in kinds for tensor in kind.values())
    assert len(storages) == len(kinds), "each kind is one buffer of its own"
    assert sum(storages.values()) == sum(held.values()) + gaps


def _all(state: ParameterState) -> list[Any]:
    kinds = (state.weights, state.gradients, state.masters, state.own_gradients)
    kinds += (state.padded_weights, state.padded_gradients)
    return [tensor for kind in kinds for tensor in kind.values()]


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_what_the_layers_save_is_declared_by_the_policy(sequence_parallel):
    grid = Grid(tensor=4, data=2)
    asked = config(grid, "bf16", sequence_parallel=sequence_parallel)
    a_layer = saved_bytes(asked.model, "linear_outputs", 2, 32, 4, sequence_parallel)
    (actions,) = run_schedule(asked, grid).actions
    assert kept_bytes(asked, Place(grid, 0), actions) == {"saved activations": 2 * a_layer}


def test_7b_on_four_by_two_by_hand():
    """LLaMA 7B, whose every dimension eight ranks divide but the norms of 65 x 4096.

    A tensor rank has a quarter of the matrices and all norms; a data rank half of that.
    """
    grid = Grid(tensor=4, data=2)
    asked = parse_config(
        {
            "model": {"preset": "llama-7b"},
            "train": {"steps": 1, "sequence_length": 2048, "global_batch": 8, "micro_batch": 4},
            "optimizer": {"lr": 1e-3},
            "parallel": {"tensor": 4},
        }
    )
    norms = 65 * 4096
    here = (6_738_415_616 - norms) // 4 + norms
    tokens = 4 * 2048
    stream, copy = tokens * 4096 * 2 // 4, tokens * 4096 * 2
    found = held_bytes(asked, grid, Device("cuda"))
    assert {name: found[name] for name in found if ":" not in name} == {
        "weights": 2 * here,
        "masters": 4 * here // 2,
        "gradients": 4 * here,
        "moments": 8 * here // 2,
        # 2 + 6 + 2 + 2 + 4·11008/4096 widths and 32 log-sum-exps a token, a quarter of 8,192.
        "saved activations": 32 * 2048 * (12 * 4096 + 4 * 11008 + 4 * 32),
        "rotations": 2048 * 64 * 2 * 4,
        "logits": tokens * 8000 * 2,
        "inputs": tokens * (2 * 8 + 64 * 2 * 4),
    }
    # Attention's backward of the topmost layer, beside what is saved: dz, dx2 and n1 (shards),
    # n2, dx2 and n1 whole, do, dqkv and its copy, dq in fp32; of the saved set x2 is used up.
    heads = tokens * 1024 * 2
    workspace = 3 * stream + 3 * copy + heads + 2 * 3 * heads + 2 * heads - stream
    assert found["workspace: attention's backward"] == workspace


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp64"])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb-v"])
def test_of_a_pipeline_too_they_are_the_buffers_that_each_rank_makes(schedule, precision, tied):
    """A tied weight is on both end ranks with a gradient each, or on one with two gradients."""
    grid = Grid(tensor=2, data=2, pipeline=2)
    asked = pipeline(grid, schedule=schedule, precision=precision, tie_embeddings=tied)
    held = []
    for rank in grid.group("pipeline", 0):
        place = Place(grid, rank)
        tables = rank_tables(asked, place)
        ends = [EMBEDDING] * any(chunk.embedding for chunk, _ in tables)
        ends += [OUTPUT] * any(chunk.head for chunk, _ in tables)
        table = [shard for _, shards in tables for shard in shards]
        state = ParameterState(table, DTYPES[precision], CPU, ends if tied else ())
        actions = run_schedule(asked, grid).actions[place.along("pipeline")]
        held.append(rank_bytes(asked, place, actions))
        check_buffers(held[-1], state)
    assert held_bytes(asked, grid) in held
    assert sum(held_bytes(asked, grid).values()) == max(sum(sizes.values()) for sizes in held)


@pytest.mark.parametrize("schedule", NAMES)
def test_saved_sets_are_as_many_as_the_schedule_promises(schedule):
    """With chunks of one size a set is so many layers; here of 4 ranks with 8 layers."""
    grid = Grid(data=2, pipeline=4)
    asked = pipeline(grid, schedule=schedule, stage_layers="even")
    layers = 8 // (4 * asked.parallel.chunks_per_rank)
    a_layer = saved_bytes(asked.model, "linear_outputs", 2, 32)
    state = weight_state_bytes(asked.model, 2, 32)
    split = 0
    for stage, actions in enumerate(run_schedule(asked, grid).actions):
        sizes = kept_bytes(asked, Place(grid, grid.group("pipeline", 0)[stage]), actions)
        assert sizes["saved activations"] == peak_in_flight(actions) * layers * a_layer
        waiting = peak_weight_states(actions)
        assert sizes.get("saved from B to W", 0) == waiting * layers * state
        split += waiting
    assert bool(split) == schedule.startswith("zb")


def test_1f1b_by_hand():
    """Rank r of 4 holds 4 - r micro-batches of its layers; of 3, 1, 1 and 3 rank 0 the most."""
    grid = Grid(pipeline=4)
    asked = pipeline(grid, stage_layers=[3, 1, 1, 3])
    a_layer = saved_bytes(asked.model, "linear_outputs", 2, 32)
    lists = run_schedule(asked, grid).actions
    ranks = [kept_bytes(asked, Place(grid, rank), lists[rank]) for rank in range(4)]
    found = [sizes["saved activations"] for sizes in ranks]
    assert found == [n * a_layer for n in (4 * 3, 3 * 1, 2 * 1, 1 * 3)]


def test_chunks_of_a_rank_count_with_their_own_layers():
    """Interleaved on one rank, chunks of 1, 2 and 5 layers and one micro-batch: all are held."""
    asked = pipeline(Grid(), schedule="interleaved", virtual_stages=3, stage_layers=[1, 2, 5])
    (actions,) = run_schedule(asked, Grid(), 1).actions
    assert peak_layers(actions, {0: 1, 1: 2, 2: 5}, "F", ("B", "BW")) == 8
    assert peak_layers(actions, {0: 1, 1: 2, 2: 5}, "B", ("W",)) == 0


def test_an_early_step_keeps_this_rank_s_masters_and_moments():
    """12 bytes of fp32 for each parameter that it has."""
    grid = Grid(data=2, pipeline=2)
    plain, early = (held_bytes(pipeline(grid, early_step=on), grid) for on in (False, True))
    assert early.pop("kept for early_step") == plain["masters"] + plain["moments"]
    assert early == plain


def test_what_other_packages_decide_is_what_they_do():
    assert PACKED == ALONE
    assert 2 * SCRATCH * torch.int32.itemsize == WGRAD_SCRATCH
