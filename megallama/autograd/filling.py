"""Tensors that passes are still filling, chunk by chunk.

The last step of filling is an addition, and what reads the chunk first is a norm that can make it
in the same pass over memory; so a pass that fills may leave the addition to whoever goes on.
Shapes: t tokens of this rank's sequence shard, c of a chunk of it, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from megallama.autograd.passes import Pass, in_turns
from megallama.autograd.protocols import Norm


class Sum(NamedTuple):
    """What a chunk (c, D) is the sum of: the residual stream and a linear layer's output."""

    residual: Tensor
    update: Tensor


#: A pass that fills a chunk, but for a sum that it returns.
Fill: TypeAlias = Pass[Sum | None]


@dataclass(frozen=True)
class Filling:
    """A tensor (t, D) and, for each of its chunks, the pass that fills it."""

    x_tD: Tensor
    passes: Sequence[Fill]


def filled(x_tD: Tensor, chunks: int) -> Filling:
    """A tensor that is there."""
    return Filling(x_tD, [_nothing() for _ in range(chunks)])


def fill_and_normalise(fill: Fill, x_cD: Tensor, norm: Norm, w_D: Tensor) -> Pass[Tensor]:
    """Finish a chunk, and return its norm."""
    rest = yield from fill
    if rest is None:
        return norm.forward(x_cD, w_D)
    return norm.add_forward(*rest, w_D, out=x_cD)


def fill_all(x: Filling) -> Pass[Tensor]:
    """Finish every chunk, and return the tensor (t, D)."""

    def finish(fill: Fill, x_cD: Tensor) -> Pass[None]:
        rest = yield from fill
        if rest is not None:
            torch.add(*rest, out=x_cD)

    pieces = zip(x.passes, x.x_tD.chunk(len(x.passes)), strict=True)
    yield from in_turns([finish(*piece) for piece in pieces])
    return x.x_tD


def _nothing() -> Fill:
    """The pass before a tensor that is there."""
    yield from ()
    return None
