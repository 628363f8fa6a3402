"""The end of the model: final norm, output projection, loss.

The loss's gradient is born in the forward pass (see `cross_entropy`), so what is saved for the
backward is the gradient of the norm's output, and the output projection's weight gradient is
already in its buffer.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from torch import Tensor

from megallama.autograd.passes import Pass
from megallama.autograd.protocols import Norm
from megallama.autograd.stash import Saved, Stash
from megallama.dist.handle import Handle


class Output(Protocol):
    """The output projection and its loss, over this rank's share of the vocabulary."""

    def gather(self, n_tD: Tensor) -> Handle[Tensor]: ...

    def scatter(self, dn_TD: Tensor) -> Handle[Tensor]: ...

    def weight(self) -> Handle[Tensor]: ...

    def loss(self, n_TD: Tensor, w_VD: Tensor, labels_T: Tensor) -> Tensor: ...

    def loss_and_gradient(
        self, n_TD: Tensor, w_VD: Tensor, labels_T: Tensor
    ) -> tuple[Tensor, Tensor]: ...


class Head:
    """The passes of the final norm, the output projection and the loss."""

    def __init__(self, norm: Norm, output: Output) -> None:
        self.norm, self.output = norm, output

    def forward(
        self, x_tD: Tensor, labels_T: Tensor, stash: Stash | None, key: Hashable
    ) -> Pass[Tensor]:
        """Return each token's loss (T,). Without a stash no gradient is made: evaluation."""
        n_tD = self.norm.forward(x_tD, (yield self.norm.weight()))
        n_TD = yield self.output.gather(n_tD)
        w_VD = yield self.output.weight()
        if stash is None:
            return self.output.loss(n_TD, w_VD, labels_T)
        loss_T, dn_TD = self.output.loss_and_gradient(n_TD, w_VD, labels_T)
        stash.put(key, {"x": x_tD, "dn": dn_TD})
        return loss_T

    def backward(self, saved: Saved) -> Pass[Tensor]:
        """Return the gradient of the last layer's output (t, D)."""
        dn_tD = yield self.output.scatter(saved.pop("dn"))
        return self.norm.backward(dn_tD, saved.pop("x"), (yield self.norm.weight()))
