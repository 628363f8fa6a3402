"""The tensors behind the parameters: compute weights, gradients and masters.

All parameters of a kind lie in one flat buffer, in the table's order. Masters and gradients are
fp32 (fp64 under fp64); the weights that the passes multiply by are a bf16 copy of the masters, or
the masters themselves where the compute dtype is theirs.

A tied output projection is the embedding's weight with a gradient buffer of its own: the sum of the
two gradients is then made in one place, whatever stage each came from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megallama.dist.handle import Done, Handle
from megallama.spec.parameters import EMBEDDING, OUTPUT, Parameter


class ParameterState:
    """Weights, gradients and masters of a parameter table."""

    def __init__(
        self,
        table: Sequence[Parameter],
        compute: torch.dtype,
        device: torch.device,
        tied: bool = False,
    ) -> None:
        self.table = tuple(table)
        self.compute = compute
        self.wide = torch.promote_types(compute, torch.float32)
        self.tied = tied
        numel = sum(parameter.numel for parameter in table)
        self.flat_masters = torch.zeros(numel, dtype=self.wide, device=device)
        self.masters = self._views(self.flat_masters)
        self.flat_weights = self.flat_masters
        if compute != self.wide:
            self.flat_weights = torch.zeros(numel, dtype=compute, device=device)
        self.weights = self._views(self.flat_weights)
        tied_numel = self.masters[EMBEDDING].numel() if tied else 0
        self.flat_gradients = torch.zeros(numel + tied_numel, dtype=self.wide, device=device)
        self.gradients = self._views(self.flat_gradients[:numel])
        if tied:
            self.weights[OUTPUT] = self.weights[EMBEDDING]
            tied_gradient = self.flat_gradients[numel:]
            self.gradients[OUTPUT] = tied_gradient.view_as(self.masters[EMBEDDING])

    def weight(self, name: str) -> Handle[Tensor]:
        """The parameter in the compute dtype."""
        return Done(self.weights[name])

    def zero_gradients(self) -> None:
        self.flat_gradients.zero_()

    def fold_tied_gradient(self) -> None:
        """Add the tied output projection's gradient to the embedding's, once a step."""
        if self.tied:
            self.gradients[EMBEDDING].add_(self.gradients[OUTPUT])

    def refresh_weights(self) -> None:
        """Round the masters to the compute dtype, after they changed."""
        if self.flat_weights is not self.flat_masters:
            self.flat_weights.copy_(self.flat_masters)

    def parts(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Each part's name and its rows of `tensors`, which are keyed by parameter."""
        for parameter in self.table:
            rows = [part.shape[0] for part in parameter.parts]
            pieces = tensors[parameter.name].split(rows)
            yield from zip((part.name for part in parameter.parts), pieces, strict=True)

    def bytes_held(self) -> dict[str, int]:
        """Bytes of each kind of buffer."""
        weights = 0 if self.flat_weights is self.flat_masters else self.flat_weights.nbytes
        masters, gradients = self.flat_masters.nbytes, self.flat_gradients.nbytes
        return {"masters": masters, "weights": weights, "gradients": gradients}

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        pieces = flat.split([parameter.numel for parameter in self.table])
        return {p.name: piece.view(p.shape) for p, piece in zip(self.table, pieces, strict=True)}
