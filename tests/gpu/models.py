"""Small LLaMAs on a GPU in bf16, and the two that they are compared with.

The truth is `tests.reference.plain` in fp64 on the CPU; the naive one is the same text in bf16 on
the device. Weights are numbers of bf16, so that none of the three rounds them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megallama.dist.group import SingleGroup
from megallama.model.llama import Llama
from megallama.parallel.state import ParameterState
from megallama.parallel.tokens import TokenShards
from megallama.spec.grid import ALONE
from megallama.spec.parameters import EMBEDDING, OUTPUT, parameter_table
from megallama.spec.shards import shard_table
from tests.harness import model_config, parts, put, whole
from tests.reference import Shape, random_weights

#: Head widths and lengths of the flash kernels' tiles and of none; grouped queries.
SHAPES = {
    "heads of 128": Shape(d_model=512, heads=4, kv_heads=2, ffn=1376, vocab=1000),
    "heads of 64": Shape(d_model=384, heads=6, kv_heads=6, ffn=1032, vocab=517),
    "heads of 8": Shape(d_model=40, heads=5, kv_heads=1, ffn=100, vocab=61, tie_embeddings=True),
}


def bf16_weights(shape: Shape) -> dict[str, Tensor]:
    """In fp64, of numbers that bf16 has."""
    return {name: w.bfloat16().double() for name, w in random_weights(shape).items()}


def build_model(
    shape: Shape, weights: Mapping[str, Tensor], device: torch.device, policy: str
) -> Llama:
    config = model_config(shape)
    table = shard_table(parameter_table(config), ALONE)
    ends = (EMBEDDING, OUTPUT) if shape.tie_embeddings else ()
    state = ParameterState(table, torch.bfloat16, device, ends)
    put(parts(state, state.masters), weights)
    state.round_masters()
    return Llama(config, state, TokenShards(SingleGroup()), policy, [whole(config)])


def error(result: Tensor, truth: Tensor) -> float:
    """‖result − truth‖ / ‖truth‖ in fp64."""
    truth = truth.double().cpu()
    return float((result.double().cpu() - truth).norm() / truth.norm())


def assert_as_good(ours: Tensor, naive: Tensor, truth: Tensor, what: str) -> None:
    """The numerics rule: at most twice the error of plain PyTorch in the same precision."""
    found, allowed = error(ours, truth), 2 * error(naive, truth)
    assert found <= allowed, f"{what}: {found:.2e}; {allowed:.2e} is allowed"
