"""LLaMA (arXiv 2302.13971): embedding, decoder layers, head, as passes over one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from megallama.autograd.head import Head
from megallama.autograd.layer import DecoderLayer, Filling, Heads, Positions
from megallama.autograd.linear import linear_forward
from megallama.autograd.passes import Pass, WgradQueue
from megallama.autograd.rope import RotationTable, rope_frequencies
from megallama.autograd.segments import Segments
from megallama.autograd.stash import Stash
from megallama.config.schema import Model
from megallama.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megallama.parallel.norm import SequenceParallelRMSNorm
from megallama.parallel.state import ParameterState
from megallama.parallel.tokens import TokenShards
from megallama.parallel.vocab import VocabParallelEmbedding, VocabParallelOutput, vocab_shard
from megallama.spec.parameters import FINAL_NORM, layer_name
from megallama.spec.saved import POLICIES


@dataclass(frozen=True)
class MicroBatch:
    """B samples of S tokens as passes see them: T = B·S tokens in sample order.

    `labels_T` holds each token's successor, or `IGNORE`.
    """

    tokens_T: Tensor
    labels_T: Tensor
    positions: Positions


class Llama:
    """The model's passes, for one tensor rank. Weights live in `state`."""

    def __init__(
        self, config: Model, state: ParameterState, tokens: TokenShards, policy: str
    ) -> None:
        self.config, self.state, self.tokens = config, state, tokens
        vocab = vocab_shard(config.vocab, tokens)
        self.embedding = VocabParallelEmbedding(state, tokens, vocab)
        self.layers = [
            _decoder_layer(config, state, tokens, index, POLICIES[policy])
            for index in range(config.layers)
        ]
        norm = SequenceParallelRMSNorm(FINAL_NORM, state, config.norm_eps)
        self.head = Head(norm, tokens, VocabParallelOutput(state, vocab))
        frequencies = rope_frequencies(config.head_width, config.rope_theta, config.rope_scaling)
        self.rotations = RotationTable(frequencies, state.wide, state.device)

    def forward(self, batch: MicroBatch, stash: Stash | None) -> Pass[Tensor]:
        """Return each token's loss (T,), zero where the label is IGNORE.

        With a stash every layer leaves its saved set there for `backward`, which must follow.
        """
        x = yield from self._hidden(batch.tokens_T, batch.positions, stash)
        return (yield from self.head.forward(x, batch.labels_T, stash, "head"))

    def backward(self, batch: MicroBatch, stash: Stash, queue: WgradQueue) -> Pass[None]:
        """Add the gradients of the summed loss to the gradient buffers."""
        dz_tD = yield from self.head.backward(stash.take("head"))
        for index in reversed(range(len(self.layers))):
            saved = stash.take(index)
            layer = self.layers[index]
            dz_tD = yield from layer.backward(dz_tD, batch.positions, saved, queue)
        yield from self.embedding.backward(dz_tD, batch.tokens_T)

    def logits(self, tokens_T: Tensor, positions: Positions) -> Pass[Tensor]:
        """The logits (T, v) of every token over this rank's share of the vocabulary."""
        x = yield from self._hidden(tokens_T, positions, None)
        n_TD = yield from self.head.normalised(x)
        return linear_forward(n_TD, (yield self.head.output.weight()))

    def positions(self, lengths: Sequence[Sequence[int]]) -> Positions:
        """Positions of samples made of documents of these lengths; each document starts at 0."""
        segments = Segments(tuple(chain.from_iterable(lengths)))
        positions_T = torch.cat([torch.arange(length) for length in segments.lengths])
        return Positions(self.rotations.at(positions_T, segments.longest), segments)

    def _hidden(self, tokens_T: Tensor, positions: Positions, stash: Stash | None) -> Pass[Filling]:
        x = yield from self.embedding.forward(tokens_T)
        for index, layer in enumerate(self.layers):
            x = yield from layer.forward(x, positions, stash, index)
        return x


def _decoder_layer(
    config: Model, state: ParameterState, tokens: TokenShards, index: int, saves: frozenset[str]
) -> DecoderLayer:
    def norm(name: str) -> SequenceParallelRMSNorm:
        return SequenceParallelRMSNorm(layer_name(index, name), state, config.norm_eps)

    def column(name: str) -> ColumnParallelLinear:
        return ColumnParallelLinear(layer_name(index, name), state)

    def row(name: str) -> RowParallelLinear:
        return RowParallelLinear(layer_name(index, name), state)

    ranks = tokens.group.size
    return DecoderLayer(
        Heads(config.heads // ranks, max(1, config.kv_heads // ranks), config.head_width),
        tokens,
        (norm("attention_norm"), column("wqkv"), row("wo")),
        (norm("ffn_norm"), column("w13"), row("w2")),
        saves,
    )
