"""Bytes on a grid: those of the buffers that rank 0 really makes, and published ones by hand."""

from __future__ import annotations

from typing import Any

import pytest

from megallama.config.load import parse_config
from megallama.config.schema import Config
from megallama.optim.adamw import AdamW
from megallama.parallel.state import ParameterState
from megallama.spec.grid import Grid, Place
from megallama.spec.memory import held_bytes
from megallama.spec.parameters import parameter_table
from megallama.spec.saved import saved_bytes
from megallama.spec.shards import shard_table
from megallama.train.device import DTYPES
from tests.unit.optim.trainers import CPU, optimizer_config

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


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.tensor}x{g.data}")
def test_they_are_the_buffers_that_a_rank_makes(grid, precision, tied):
    asked = config(grid, precision, tied)
    sizes = held_bytes(asked, grid)
    table = shard_table(parameter_table(asked.model), Place(grid, 0))
    state = ParameterState(table, DTYPES[precision], CPU, tied)
    parameters = [shard.parameter for shard in table]
    optimizer = AdamW(optimizer_config(), parameters, state.masters, state.own_gradients)
    held = state.bytes_held()
    assert {name: sizes[name] for name in held} == held
    assert sizes["masters"] == held.get("masters", 0)
    moments = (*optimizer.exp_avg.values(), *optimizer.exp_avg_sq.values())
    assert sizes["moments"] == sum(moment.nbytes for moment in moments)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _all(state)}
    assert sum(storages.values()) == sum(held.values()), "each kind is one buffer of its own"


def _all(state: ParameterState) -> list[Any]:
    kinds = (state.weights, state.gradients, state.masters, state.own_gradients)
    kinds += (state.padded_weights, state.padded_gradients)
    return [tensor for kind in kinds for tensor in kind.values()]


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_what_the_layers_save_is_declared_by_the_policy(sequence_parallel):
    grid = Grid(tensor=4, data=2)
    asked = config(grid, "bf16", sequence_parallel=sequence_parallel)
    a_layer = saved_bytes(asked.model, "linear_outputs", 2, 32, 4, sequence_parallel)
    assert held_bytes(asked, grid)["saved activations"] == 2 * a_layer


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
    assert held_bytes(asked, grid) == {
        "weights": 2 * here,
        "masters": 4 * here // 2,
        "gradients": 4 * here,
        "moments": 8 * here // 2,
        # 2 + 6 + 2 + 2 + 4·11008/4096 widths and 32 log-sum-exps a token, a quarter of 8,192.
        "saved activations": 32 * 2048 * (12 * 4096 + 4 * 11008 + 4 * 32),
    }
