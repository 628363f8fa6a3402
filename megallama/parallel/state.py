"""The tensors behind the parameters: compute weights, gradients and masters, as one rank has them.

Weights and gradients are those of the tensor rank's shard, all of it, because the passes need it.
Masters, like the optimizer's moments, are this data rank's rows of that (ZeRO-1). All tensors of a
kind lie in one flat buffer, in the table's order, each padded to a multiple of the data ranks in
rows; padding is zero and stays so.

Masters and gradients are fp32 (fp64 under fp64); the weights that the passes multiply by are
rounded to bf16 from the masters. Where the compute dtype is the masters', these are views of the
weights.

A tied output projection is the embedding's weight with a gradient of its own: the sum of the two is
made in one place, whether both are here or each on a pipeline rank of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from megallama.dist.handle import Done, Handle
from megallama.spec.parameters import EMBEDDING, OUTPUT
from megallama.spec.shards import Piece, Shard

Tensors = dict[str, Tensor]

#: Bytes. On a CPU the last bit of a GEMM depends on where its operands begin (MKL), and where a
#: parameter begins would depend on which others are on its rank.
ALIGNMENT = 64


class ParameterState:
    """Weights, gradients and masters of a table of shards, by the parameter's name.

    `weights` and `gradients` are what the passes use; `padded_weights` and `padded_gradients` the
    same with their padding; `masters` and `own_gradients` this data rank's rows, and `own_weights`
    the weights that are rounded from the masters, empty where masters are views of the weights.

    `tied_ends`: of a tied model, which of EMBEDDING and OUTPUT this rank has; empty where the model
    is not tied. A rank with the output alone holds a copy of the embedding's weight.
    """

    def __init__(
        self,
        table: Sequence[Shard],
        compute: torch.dtype,
        device: torch.device,
        tied_ends: Sequence[str] = (),
    ) -> None:
        self.table = tuple(table)
        self.compute = compute
        self.wide = torch.promote_types(compute, torch.float32)
        self.device = device
        self.folds = {EMBEDDING, OUTPUT} <= set(tied_ends)
        self.arriving: dict[str, Handle[Tensor]] = {}
        self.on_landed: Callable[[str], None] | None = None
        self.padded_weights = _tensors({s.name: s.padded_shape for s in table}, compute, device)
        self.weights = self._without_padding(self.padded_weights)
        shapes = {s.name: s.padded_shape for s in table}
        if self.folds:
            shapes[OUTPUT] = shapes[EMBEDDING]
        self.padded_gradients = _tensors(shapes, self.wide, device)
        self.gradients = self._without_padding(self.padded_gradients)
        self.own_gradients = self._own_rows(self.padded_gradients)
        self.own_weights: Tensors = {}
        if compute == self.wide:
            self.masters = self._own_rows(self.padded_weights)
        else:
            self.own_weights = self._own_rows(self.padded_weights)
            self.masters = _tensors({s.name: s.own_shape for s in table}, self.wide, device)
        #: Parameter of every gradient that lands here, by the name with which it does.
        self.parameter_of = {s.name: s.name for s in table}
        if OUTPUT in tied_ends:
            self.weights[OUTPUT] = self.weights[EMBEDDING]
            rows = len(self.weights[EMBEDDING])
            kept = self.padded_gradients[OUTPUT if self.folds else EMBEDDING]
            self.gradients[OUTPUT] = kept[:rows]
            self.parameter_of[OUTPUT] = EMBEDDING
            if not self.folds:
                del self.parameter_of[EMBEDDING]

    def weight(self, name: str) -> Handle[Tensor]:
        """The parameter in the compute dtype; it may still be arriving from the data ranks."""
        return self.arriving.pop(name, None) or Done(self.weights[name])

    def landed(self, name: str) -> None:
        """Say that a micro-batch's gradient of this parameter is in its buffer."""
        if self.on_landed:
            self.on_landed(name)

    def zero_gradients(self) -> None:
        torch._foreach_zero_(list(self.padded_gradients.values()))

    def fold_tied_gradient(self) -> None:
        """Add the tied output projection's gradient to the embedding's, once a step."""
        if self.folds:
            self.gradients[EMBEDDING].add_(self.gradients[OUTPUT])

    def round_masters(self) -> None:
        """Round the masters into this data rank's rows of the weights, after they changed."""
        if self.own_weights:
            masters = [self.masters[name] for name in self.own_weights]
            torch._foreach_copy_(list(self.own_weights.values()), masters)

    def pieces(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Piece, Tensor]]:
        """The rectangles that tensors of this data rank's rows hold, and views of them."""
        for shard in self.table:
            for piece in shard.own_pieces:
                yield piece, tensors[shard.name][piece.rows]

    def bytes_held(self) -> dict[str, int]:
        """Bytes of each kind of buffer, without the gaps that align its tensors."""
        kinds = {"weights": self.padded_weights, "gradients": self.padded_gradients}
        if self.compute != self.wide:
            kinds["masters"] = self.masters
        return {kind: sum(t.nbytes for t in tensors.values()) for kind, tensors in kinds.items()}

    def _without_padding(self, tensors: Tensors) -> Tensors:
        return {s.name: tensors[s.name][: s.shape[0]] for s in self.table}

    def _own_rows(self, tensors: Tensors) -> Tensors:
        return {s.name: tensors[s.name][s.own_rows] for s in self.table}


def _tensors(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> Tensors:
    """Zeros of these shapes in one flat buffer, each from a multiple of ALIGNMENT on."""
    sizes = [prod(shape) for shape in shapes.values()]
    unit = ALIGNMENT // dtype.itemsize
    room = [-(-size // unit) * unit for size in sizes]
    pieces = torch.zeros(sum(room), dtype=dtype, device=device).split(room)
    return {
        name: piece[:size].view(shapes[name])
        for name, size, piece in zip(shapes, sizes, pieces, strict=True)
    }
