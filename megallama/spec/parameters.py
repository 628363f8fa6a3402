"""The parameter table: every weight of a model, in the one order that all readers use.

A `Parameter` is what a pass multiplies by. Its `parts` are the named global tensors that a
checkpoint holds: the query, key and value projections run as one GEMM, so they are one parameter of
three parts stacked along the rows. Names are those of Meta's LLaMA release; linear weights are
(outputs, inputs); rotary embeddings rotate halves, so no part is permuted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megallama.config.schema import Model

INIT_STD = 0.02  # Megatron-LM's; the LLaMA papers do not publish theirs


@dataclass(frozen=True)
class Part:
    """A named global tensor. `init_std` is None where the tensor starts at one (norms)."""

    name: str
    shape: tuple[int, ...]
    init_std: float | None

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


def parameter_table(model: Model) -> tuple[Parameter, ...]:
    """Every parameter, from the embedding to the output projection (absent when it is tied)."""
    d, vocab = model.d_model, model.vocab
    table = [_linear(EMBEDDING, [(f"{EMBEDDING}.weight", vocab)], d, INIT_STD, 0, None)]
    for layer in range(model.layers):
        table += _decoder_layer(model, layer)
    table.append(_norm(FINAL_NORM, d, None))
    if not model.tie_embeddings:
        table.append(_linear(OUTPUT, [(f"{OUTPUT}.weight", vocab)], d, INIT_STD, 0, None))
    return tuple(table)


def layer_name(layer: int, name: str) -> str:
    """The name of a decoder layer's parameter: `wqkv wo w13 w2 attention_norm ffn_norm`."""
    return f"layers.{layer}.{name}"


def _decoder_layer(model: Model, layer: int) -> list[Parameter]:
    d, ffn, width = model.d_model, model.ffn, model.head_width
    queries, keys = model.heads * width, model.kv_heads * width
    attention, feed_forward = layer_name(layer, "attention"), layer_name(layer, "feed_forward")
    # The residual stream sums 2·L branches: their last projections start smaller by √(2·L), so that
    # its variance at the head does not grow with depth (GPT-2's rule, kept by Megatron-LM).
    residual_std = INIT_STD / math.sqrt(2 * model.layers)
    qkv = [(f"{attention}.{n}.weight", r) for n, r in (("wq", queries), ("wk", keys), ("wv", keys))]
    w13 = [(f"{feed_forward}.{n}.weight", ffn) for n in ("w1", "w3")]
    return [
        _norm(layer_name(layer, "attention_norm"), d, layer),
        _linear(layer_name(layer, "wqkv"), qkv, d, INIT_STD, 0, layer),
        _linear(
            layer_name(layer, "wo"),
            [(f"{attention}.wo.weight", d)],
            queries,
            residual_std,
            1,
            layer,
        ),
        _norm(layer_name(layer, "ffn_norm"), d, layer),
        _linear(layer_name(layer, "w13"), w13, d, INIT_STD, 0, layer),
        _linear(
            layer_name(layer, "w2"), [(f"{feed_forward}.w2.weight", d)], ffn, residual_std, 1, layer
        ),
    ]


def _linear(
    name: str,
    rows: list[tuple[str, int]],
    columns: int,
    std: float,
    shard_dim: Literal[0, 1],
    layer: int | None,
) -> Parameter:
    parts = tuple(Part(part, (count, columns), std) for part, count in rows)
    return Parameter(name, parts, shard_dim, layer)


def _norm(name: str, width: int, layer: int | None) -> Parameter:
    return Parameter(name, (Part(f"{name}.weight", (width,), None),), None, layer)
