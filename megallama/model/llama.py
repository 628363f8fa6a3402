"""LLaMA (arXiv 2302.13971): the chunks of a rank, put together from the parallel layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from megallama.autograd.head import Head
from megallama.autograd.layer import DecoderLayer, Heads, Positions
from megallama.autograd.linear import linear_forward
from megallama.autograd.passes import Pass
from megallama.autograd.rotation import RotationTable, rope_frequencies
from megallama.autograd.segments import Segments
from megallama.config.schema import Model
from megallama.model.chunk import MicroBatch, ModelChunk
from megallama.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megallama.parallel.norm import SequenceParallelRMSNorm
from megallama.parallel.state import ParameterState
from megallama.parallel.tokens import TokenShards
from megallama.parallel.vocab import VocabParallelEmbedding, VocabParallelOutput, vocab_shard
from megallama.spec.parameters import FINAL_NORM, layer_name
from megallama.spec.saved import POLICIES
from megallama.spec.stages import Chunk


class Llama:
    """This rank's chunks of the model, by their index. Weights live in `state`."""

    def __init__(
        self,
        config: Model,
        state: ParameterState,
        tokens: TokenShards,
        policy: str,
        chunks: Sequence[Chunk],
    ) -> None:
        self.config, self.state, self.tokens = config, state, tokens
        vocab = vocab_shard(config.vocab, tokens)

        def build(chunk: Chunk) -> ModelChunk:
            layers = {i: _decoder_layer(config, state, tokens, i, policy) for i in chunk.layers}
            embedding = VocabParallelEmbedding(state, tokens, vocab) if chunk.embedding else None
            norm = SequenceParallelRMSNorm(FINAL_NORM, state, config.norm_eps)
            head = Head(norm, tokens, VocabParallelOutput(state, vocab)) if chunk.head else None
            return ModelChunk(layers, tokens.chunks, embedding, head)

        self.chunks = {chunk.index: build(chunk) for chunk in chunks}
        frequencies = rope_frequencies(config.head_width, config.rope_theta, config.rope_scaling)
        self.rotations = RotationTable(frequencies, state.wide, state.device)

    def logits(self, tokens_T: Tensor, positions: Positions) -> Pass[Tensor]:
        """The logits (T, v) of every token over this rank's share of the vocabulary.

        Of a model that is one chunk, as that of a process that is alone.
        """
        (chunk,) = self.chunks.values()
        assert chunk.head is not None
        x = yield from chunk.hidden(MicroBatch(tokens_T, tokens_T, positions), None, None)
        n_TD = yield from chunk.head.normalised(x)
        return linear_forward(n_TD, (yield chunk.head.output.weight()))

    def positions(self, lengths: Sequence[Sequence[int]]) -> Positions:
        """Positions of samples made of documents of these lengths; each document starts at 0."""
        segments = Segments(tuple(chain.from_iterable(lengths)))
        positions_T = torch.cat([torch.arange(length) for length in segments.lengths])
        return Positions(self.rotations.at(positions_T, segments.longest), segments)


def _decoder_layer(
    config: Model, state: ParameterState, tokens: TokenShards, index: int, policy: str
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
        POLICIES[policy],
    )
