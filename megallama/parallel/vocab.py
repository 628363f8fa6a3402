"""The two ends of the model that are divided by the vocabulary: embedding and output.

A vocabulary that the tensor ranks do not divide evenly is padded at its end. Padding is no token's
row and has no probability, so its weights stay zero and its gradients are zero.
"""

from __future__ import annotations

from torch import Tensor

from megallama.autograd.cross_entropy import LinearCrossEntropy, VocabShard, Wgrad
from megallama.autograd.embedding import embedding_backward, embedding_forward
from megallama.autograd.filling import Fill, Filling
from megallama.autograd.passes import Pass
from megallama.dist.handle import Handle
from megallama.parallel.state import ParameterState
from megallama.parallel.tokens import TokenShards
from megallama.spec.parameters import EMBEDDING, OUTPUT
from megallama.spec.shards import vocab_rows


def vocab_shard(vocab: int, tokens: TokenShards) -> VocabShard:
    """This tensor rank's share of the vocabulary."""
    group = tokens.group
    height = vocab_rows(vocab, group.size)
    first = min(vocab, group.rank * height)
    return VocabShard(first, min(height, vocab - first), group.size, group.all_gather)


class VocabParallelEmbedding:
    """Rows of the embedding table for the tokens of a micro-batch.

    A token's row comes from the one rank that holds it and zeros from the others, so the sum over
    ranks is exact.
    """

    def __init__(self, state: ParameterState, tokens: TokenShards, vocab: VocabShard) -> None:
        self.state, self.tokens, self.vocab = state, tokens, vocab

    def forward(self, tokens_T: Tensor) -> Pass[Filling]:
        """(T,) → (t, D), which the chunks' passes fill."""
        w_vD = yield self.state.weight(EMBEDDING)
        x_tD = w_vD.new_empty(self.tokens.shard_rows(len(tokens_T)), w_vD.shape[1])

        def chunk(tokens_C: Tensor, x_cD: Tensor) -> Fill:
            rows_CD = embedding_forward(tokens_C - self.vocab.first, w_vD, self.vocab.rows)
            x_cD.copy_((yield self.tokens.scatter_chunk(rows_CD)))
            return None

        pieces = zip(self.tokens.split(tokens_T), self.tokens.split(x_tD), strict=True)
        return Filling(x_tD, [chunk(*piece) for piece in pieces])

    def backward(self, dx_tD: Tensor, tokens_T: Tensor) -> Pass[None]:
        """Add (t, D) into the table's gradient."""
        dx_TD = yield self.tokens.gather(dx_tD)
        local_T, dw_vD = tokens_T - self.vocab.first, self.state.gradients[EMBEDDING]
        embedding_backward(dx_TD, local_T, dw_vD, self.vocab.rows)
        self.state.landed(EMBEDDING)


class VocabParallelOutput:
    """The output projection with its loss."""

    def __init__(self, state: ParameterState, vocab: VocabShard) -> None:
        self.state = state
        self.cross_entropy = LinearCrossEntropy(vocab)

    def weight(self) -> Handle[Tensor]:
        return self.state.weight(OUTPUT)

    def loss(self, n_TD: Tensor, w_vD: Tensor, labels_T: Tensor) -> Pass[Tensor]:
        """Each token's loss (T,)."""
        return self.cross_entropy.forward(n_TD, w_vD, labels_T)

    def loss_and_gradient(
        self, n_TD: Tensor, w_vD: Tensor, labels_T: Tensor
    ) -> Pass[tuple[Tensor, Tensor, Wgrad]]:
        """The losses (T,) and this shard's part of the gradient of their sum (T, D).

        The weight's gradient is in its buffer once the third has been called.
        """
        dw_vD = self.state.gradients[OUTPUT]
        loss_T, dn_TD, last_wgrad = yield from self.cross_entropy.forward_backward(
            n_TD, w_vD, labels_T, dw_vD
        )

        def wgrad() -> None:
            last_wgrad()
            self.state.landed(OUTPUT)

        return loss_T, dn_TD, wgrad
