"""A group of which this process is the only rank that is there: every operation is noted.

Results are of the right shape and hold nothing. Bytes are those of `megallama.dist.traffic`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from megallama.check.program import Log, Operation, call_site
from megallama.dist.group import COVER, COVER_ALL_REDUCE, SingleGroup
from megallama.dist.handle import Done, Handle
from megallama.dist.shapes import check_filled, check_peer, check_rows, gathered, scattered
from megallama.dist.traffic import (
    all_gather_bytes,
    all_gather_rows_bytes,
    all_reduce_bytes,
    reduce_scatter_bytes,
    reduce_scatter_rows_bytes,
)

T = TypeVar("T")

#: From the tensor that goes into a sum to what the ranks are told that it came to.
Answer = Callable[[Tensor], Tensor]


class Noted(Generic[T]):
    """The handle of a noted operation. Its first wait is noted too; later ones wait for nothing."""

    def __init__(self, value: T, cover: int, log: Log, place: int) -> None:
        self.cover = cover
        self._value, self._log, self._place = value, log, place
        self._waited = False

    def wait(self) -> T:
        if not self._waited:
            self._log.wait(self._place)
            self._waited = True
        return self._value


class NotingGroup:
    """See `dist.group.Group`. `answer`: what an all-reduce's result is; None: it holds nothing."""

    def __init__(
        self, name: str, rank: int, size: int, log: Log, answer: Answer | None = None
    ) -> None:
        self.name, self.rank, self.size = name, rank, size
        self._log, self._answer = log, answer

    def all_gather(self, x: Tensor, out: Tensor | None = None) -> Handle[Tensor]:
        filled = gathered(x, self.size, out)
        return self._note("all_gather", [x], filled, all_gather_bytes(x, self.size))

    def reduce_scatter(self, x: Tensor, wire: torch.dtype | None = None) -> Handle[Tensor]:
        shard = scattered(x, self.size)
        sent = reduce_scatter_bytes(x, self.size, wire)
        return self._note("reduce_scatter", [x], shard, sent, wire=wire)

    def all_reduce(self, x: Tensor) -> Handle[Tensor]:
        total = torch.empty_like(x) if self._answer is None else self._answer(x)
        sent = all_reduce_bytes(x, self.size)
        return self._note("all_reduce", [x], total, sent, COVER_ALL_REDUCE)

    def all_gather_rows(self, tensors: Sequence[Tensor]) -> Handle[None]:
        check_rows(tensors, self.size)
        sent = all_gather_rows_bytes(tensors, self.size)
        return self._note("all_gather_rows", tensors, None, sent)

    def reduce_scatter_rows(
        self, tensors: Sequence[Tensor], wire: torch.dtype | None = None
    ) -> Handle[None]:
        check_rows(tensors, self.size)
        sent = reduce_scatter_rows_bytes(tensors, self.size, wire)
        return self._note("reduce_scatter_rows", tensors, None, sent, wire=wire)

    def send(self, x: Tensor, peer: int, label: str = "") -> Handle[None]:
        check_peer(self.name, self.rank, self.size, peer)
        return self._message("send", x, None, (self.rank, peer), label)

    def receive(self, out: Tensor, peer: int, label: str = "") -> Handle[Tensor]:
        check_peer(self.name, self.rank, self.size, peer)
        check_filled(out)
        return self._message("receive", out, out, (peer, self.rank), label)

    def close(self) -> None:
        pass

    def _note(
        self,
        kind: str,
        tensors: Sequence[Tensor],
        value: T,
        sent: int,
        cover: int = COVER,
        wire: torch.dtype | None = None,
    ) -> Handle[T]:
        """Note a collective; `sent`: bytes."""
        shapes, dtypes = _described(tensors)
        name = None if wire is None else _name(wire)
        known = (self._log.names.get(id(x)) for x in tensors)
        label = ", ".join(filter(None, known))
        operation = Operation(self.name, kind, shapes, dtypes, name, sent, call_site(), label=label)
        place = self._log.issue(operation)
        return Noted(value, cover, self._log, place)

    def _message(
        self, kind: str, x: Tensor, value: T, ends: tuple[int, int], label: str
    ) -> Handle[T]:
        if self.size != 2:
            raise ValueError(f"group {self.name!r} of {self.size} ranks: messages take groups of 2")
        shapes, dtypes = _described([x])
        sent = x.nbytes if kind == "send" else 0
        operation = Operation(self.name, kind, shapes, dtypes, None, sent, call_site(), ends, label)
        return Noted(value, 0, self._log, self._log.issue(operation))


class AnsweringGroup(SingleGroup):
    """The world of a job of one rank: what its sum comes to is told as well."""

    def __init__(self, name: str, answer: Answer) -> None:
        super().__init__(name)
        self._answer = answer

    def all_reduce(self, x: Tensor) -> Handle[Tensor]:
        return Done(self._answer(x), COVER_ALL_REDUCE)


def _described(tensors: Sequence[Tensor]) -> tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]:
    return tuple(tuple(x.shape) for x in tensors), tuple(_name(x.dtype) for x in tensors)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
