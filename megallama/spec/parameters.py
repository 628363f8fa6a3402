"""The parameter table: every weight of a model, in the one order that all readers use.

A `Parameter` is what a pass multiplies by. Its `parts` are the named global tensors that a
checkpoint holds: the query, key and value projections run as one GEMM, so they are one parameter of
three parts stacked along the rows. Names are those of Meta's LLaMA release; linear weights are
(outputs, inputs); rotary embeddings rotate halves, so no part is permuted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from megallama.config.schema import Model

INIT_STD = 0.02  # Megatron-LM's; the LLaMA papers do not publish theirs


@dataclass(frozen=True)
class Part:
    """A named global tensor. `init_std` is None where the tensor starts at one (norms).

    `heads`: of how many attention heads its rows consist, None where of none. Heads are not cut by
    tensor parallelism; with fewer heads than ranks each is held by several.
    """

    name: str
    shape: tuple[int, ...]
    init_std: float | None
    heads: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Parameter:
    """One weight of the model.

    `shard_dim` is the dimension that tensor parallelism divides, in every part alike: 0 for a
    column-parallel linear or a vocabulary, 1 for a row-parallel linear, None where every rank has
    the whole. `layer` is None outside the decoder layers.
    """

    name: str
    parts: tuple[Part, ...]
    shard_dim: Literal[0, 1] | None
    layer: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def decays(self) -> bool:
        """Weight decay applies to matrices, not to norms."""
        return len(self.shape) == 2


EMBEDDING, FINAL_NORM, OUTPUT = "tok_embeddings", "norm", "output"


@lru_cache(maxsize=64)
def parameter_table(model: Model) -> tuple[Parameter, ...]:
    """Every parameter, from the embedding to the output projection (absent when it is tied)."""
    d, vocab = model.d_model, model.vocab
    table = [_linear(EMBEDDING, {f"{EMBEDDING}.weight": vocab}, d, shard_dim=0)]
    for layer in range(model.layers):
        table += _decoder_layer(model, layer)
    table.append(_norm(FINAL_NORM, d))
    if not model.tie_embeddings:
        table.append(_linear(OUTPUT, {f"{OUTPUT}.weight": vocab}, d, shard_dim=0))
    return tuple(table)


def layer_name(layer: int, name: str) -> str:
    """The name of a decoder layer's parameter: `wqkv wo w13 w2 attention_norm ffn_norm`."""
    return f"layers.{layer}.{name}"


def _decoder_layer(model: Model, layer: int) -> list[Parameter]:
    d, ffn, width = model.d_model, model.ffn, model.head_width
    # The residual stream sums 2·L branches: their last projections start smaller by √(2·L), so that
    # its variance at the head does not grow with depth (GPT-2's rule, kept by Megatron-LM).
    residual_std = INIT_STD / math.sqrt(2 * model.layers)

    def named(name: str) -> str:
        return layer_name(layer, name)

    def part(module: str, name: str) -> str:
        return f"{named(module)}.{name}.weight"

    qkv = tuple(
        Part(part("attention", name), (heads * width, d), INIT_STD, heads)
        for name, heads in (("wq", model.heads), ("wk", model.kv_heads), ("wv", model.kv_heads))
    )
    w13 = {part("feed_forward", name): ffn for name in ("w1", "w3")}
    wo, w2 = {part("attention", "wo"): d}, {part("feed_forward", "w2"): d}
    return [
        _norm(named("attention_norm"), d, layer),
        Parameter(named("wqkv"), qkv, 0, layer),
        _linear(named("wo"), wo, model.heads * width, shard_dim=1, layer=layer, std=residual_std),
        _norm(named("ffn_norm"), d, layer),
        _linear(named("w13"), w13, d, shard_dim=0, layer=layer),
        _linear(named("w2"), w2, ffn, shard_dim=1, layer=layer, std=residual_std),
    ]


def _linear(
    name: str,
    rows: dict[str, int],
    columns: int,
    *,
    shard_dim: Literal[0, 1],
    layer: int | None = None,
    std: float = INIT_STD,
) -> Parameter:
    parts = tuple(Part(part, (count, columns), std) for part, count in rows.items())
    return Parameter(name, parts, shard_dim, layer)


def _norm(name: str, width: int, layer: int | None = None) -> Parameter:
    return Parameter(name, (Part(f"{name}.weight", (width,), None),), None, layer)
