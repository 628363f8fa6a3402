"""The two ends of the model that are divided by the vocabulary: embedding and output."""

from __future__ import annotations

from torch import Tensor

from megallama.autograd.cross_entropy import LinearCrossEntropy
from megallama.autograd.embedding import embedding_backward, embedding_forward
from megallama.autograd.passes import Pass
from megallama.dist.group import Group
from megallama.dist.handle import Handle
from megallama.parallel.state import ParameterState
from megallama.spec.parameters import EMBEDDING, OUTPUT


class VocabParallelEmbedding:
    """Rows of the embedding table for the tokens of a micro-batch."""

    def __init__(self, state: ParameterState, group: Group) -> None:
        self.state, self.group = state, group

    def forward(self, tokens_T: Tensor) -> Pass[Tensor]:
        """(T,) → (t, D)."""
        x_TD = embedding_forward(tokens_T, (yield self.state.weight(EMBEDDING)))
        return (yield self.group.reduce_scatter(x_TD))

    def backward(self, dx_tD: Tensor, tokens_T: Tensor) -> Pass[None]:
        """Add (t, D) into the table's gradient."""
        dx_TD = yield self.group.all_gather(dx_tD)
        embedding_backward(dx_TD, tokens_T, self.state.gradients[EMBEDDING])


class VocabParallelOutput:
    """The output projection with its loss."""

    def __init__(self, state: ParameterState, group: Group) -> None:
        self.state, self.group = state, group
        self.cross_entropy = LinearCrossEntropy()

    def gather(self, n_tD: Tensor) -> Handle[Tensor]:
        return self.group.all_gather(n_tD)

    def scatter(self, dn_TD: Tensor) -> Handle[Tensor]:
        return self.group.reduce_scatter(dn_TD)

    def weight(self) -> Handle[Tensor]:
        return self.state.weight(OUTPUT)

    def loss(self, n_TD: Tensor, w_VD: Tensor, labels_T: Tensor) -> Tensor:
        """Each token's loss (T,)."""
        return self.cross_entropy.forward(n_TD, w_VD, labels_T)

    def loss_and_gradient(
        self, n_TD: Tensor, w_VD: Tensor, labels_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The losses (T,) and the gradient of their sum (T, D); dw goes to its buffer."""
        dw_VD = self.state.gradients[OUTPUT]
        return self.cross_entropy.forward_backward(n_TD, w_VD, labels_T, dw_VD)
