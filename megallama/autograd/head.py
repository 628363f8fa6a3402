"""The end of the model: final norm, output projection, loss.

The loss's gradient is born in the forward pass (see `cross_entropy`), so what is saved for the
backward is the gradient of the norm's output, and the output projection's weight gradient is
already in its buffer.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from megallama.autograd.cross_entropy import Wgrad
from megallama.autograd.filling import Fill, Filling, fill_and_normalise
from megallama.autograd.passes import Pass, in_turns
from megallama.autograd.protocols import Norm, Tokens
from megallama.autograd.stash import Saved, Stash
from megallama.dist.handle import Handle


class Output(Protocol):
    """The output projection and its loss, over this rank's share of the vocabulary."""

    def weight(self) -> Handle[Tensor]: ...

    def loss(self, n_TD: Tensor, w_vD: Tensor, labels_T: Tensor) -> Pass[Tensor]: ...

    def loss_and_gradient(
        self, n_TD: Tensor, w_vD: Tensor, labels_T: Tensor
    ) -> Pass[tuple[Tensor, Tensor, Wgrad]]: ...


class Head:
    """The passes of the final norm, the output projection and the loss."""

    def __init__(self, norm: Norm, tokens: Tokens, output: Output) -> None:
        self.norm, self.tokens, self.output = norm, tokens, output

    def forward(
        self, x: Filling, labels_T: Tensor, stash: Stash | None, key: Hashable
    ) -> Pass[Tensor]:
        """Return each token's loss (T,). Without a stash no gradient is made: evaluation."""
        n_TD = yield from self.normalised(x)
        w_vD = yield self.output.weight()
        if stash is None:
            return (yield from self.output.loss(n_TD, w_vD, labels_T))
        loss_T, dn_TD, wgrad = yield from self.output.loss_and_gradient(n_TD, w_vD, labels_T)
        dn = self.tokens.scatter(dn_TD)
        wgrad()
        stash.put(key, {"x": x.x_tD, "dn": (yield dn)})
        return loss_T

    def backward(self, saved: Saved) -> Pass[Tensor]:
        """Return the gradient of the last layer's output (t, D)."""
        return self.norm.backward(saved.pop("dn"), saved.pop("x"), (yield self.norm.weight()))

    def normalised(self, x: Filling) -> Pass[Tensor]:
        """The final norm's output, whole: (T, D)."""
        norm_w = yield self.norm.weight()
        chunks = [torch.empty(0)] * len(x.passes)

        def chunk(index: int, fill: Fill, x_cD: Tensor) -> Pass[None]:
            n_cD = yield from fill_and_normalise(fill, x_cD, self.norm, norm_w)
            chunks[index] = yield self.tokens.gather_chunk(n_cD)

        pieces = zip(count(), x.passes, self.tokens.split(x.x_tD), strict=False)
        yield from in_turns([chunk(*piece) for piece in pieces])
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks)
