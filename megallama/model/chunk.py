"""A chunk of the model: a run of decoder layers, with the embedding before it or the head after it.

The whole model is one chunk; a pipeline rank has one or several. Shapes: t this tensor rank's
tokens, T all tokens of the micro-batch, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from megallama.autograd.filling import Filling, fill_all, filled
from megallama.autograd.head import Head
from megallama.autograd.layer import DecoderLayer, Positions
from megallama.autograd.passes import Pass, WgradQueue
from megallama.autograd.stash import Stash
from megallama.parallel.vocab import VocabParallelEmbedding

#: Keys of saved sets besides the layers' numbers.
EMBEDDING, HEAD = "embedding", "head"


@dataclass(frozen=True)
class MicroBatch:
    """B samples of S tokens as passes see them: T = B·S tokens in sample order.

    `labels_T` holds each token's successor, or `IGNORE`.
    """

    tokens_T: Tensor
    labels_T: Tensor
    positions: Positions


class ModelChunk:
    """The passes of a chunk. `layers` are by their number in the model, ascending."""

    def __init__(
        self,
        layers: Mapping[int, DecoderLayer],
        token_chunks: int,
        embedding: VocabParallelEmbedding | None,
        head: Head | None,
    ) -> None:
        self.layers, self.token_chunks = layers, token_chunks
        self.embedding, self.head = embedding, head

    def forward(self, batch: MicroBatch, x_tD: Tensor | None, stash: Stash | None) -> Pass[Tensor]:
        """Return the output (t, D), or with the head each token's loss (T,): zero where IGNORE.

        `x_tD`: the output of the chunk before; the first has none. With a stash every layer leaves
        its saved set there for the backward, which must follow.
        """
        x = yield from self.hidden(batch, x_tD, stash)
        if self.head is not None:
            return (yield from self.head.forward(x, batch.labels_T, stash, HEAD))
        return (yield from fill_all(x))

    def hidden(self, batch: MicroBatch, x_tD: Tensor | None, stash: Stash | None) -> Pass[Filling]:
        """The last layer's output."""
        if self.embedding is not None:
            x = yield from self.embedding.forward(batch.tokens_T)
        else:
            assert x_tD is not None
            x = filled(x_tD, self.token_chunks)
        for index, layer in self.layers.items():
            x = yield from layer.forward(x, batch.positions, stash, index)
        return x

    def backward(
        self, batch: MicroBatch, dz_tD: Tensor | None, stash: Stash, wgrads: WgradQueue | Stash
    ) -> Pass[Tensor | None]:
        """Return the gradient of the input (t, D), or None of the first chunk.

        `dz_tD`: the gradient of the output; the last chunk's is that of the summed loss, and starts
        from what its forward left. `wgrads`: a queue, to which the weight gradients go, or a stash,
        where the layers leave what `backward_weights` needs.
        """
        if self.head is not None:
            dz_tD = yield from self.head.backward(stash.take(HEAD))
        assert dz_tD is not None
        for index in reversed(tuple(self.layers)):
            saved = stash.take(index)
            into = wgrads.put(index, {}) if isinstance(wgrads, Stash) else wgrads
            dz_tD = yield from self.layers[index].backward(dz_tD, batch.positions, saved, into)
        if self.embedding is None:
            return dz_tD
        if isinstance(wgrads, Stash):
            wgrads.put(EMBEDDING, {"dx": dz_tD})
        else:
            yield from self.embedding.backward(dz_tD, batch.tokens_T)
        return None

    def backward_weights(self, batch: MicroBatch, state: Stash) -> Pass[None]:
        """Add the weight gradients of a backward that left them in `state`."""
        for index in reversed(tuple(self.layers)):
            yield from self.layers[index].backward_weights(state.take(index))
        if self.embedding is not None:
            dx_tD = state.take(EMBEDDING)["dx"]
            yield from self.embedding.backward(dx_tD, batch.tokens_T)
