"""ZeRO-1 (arXiv 1910.02054): data ranks share the optimizer's work by rows of every parameter.

A bucket's gradients are reduce-scattered as soon as the last micro-batch's have landed, under what
is left of the backward. After the update its weights are all-gathered, all buckets in the order in
which the next forward asks for them, under that forward.

Some rectangles are held by several tensor ranks: the norms' weights, and key/value heads where
there are fewer than ranks. Each rank's gradient of these is a part of the sum. The parts are added
last, when data parallelism has divided them: sums commute, and fewer bytes move.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from megallama.dist.group import Group
from megallama.dist.handle import Handle
from megallama.parallel.state import ParameterState
from megallama.spec.buckets import buckets
from megallama.spec.parameters import EMBEDDING, OUTPUT

#: Names of parameters that travel together.
Bucket = tuple[str, ...]


@dataclass(frozen=True)
class ZeroGroups:
    """The groups that gradients are summed over.

    `data` for all; `tensor` for the norms, or None where every tensor rank has the whole sum
    already (no sequence parallelism); `key_value` for replicated key/value heads; `tied` for an
    embedding that another pipeline rank has as its output projection, or the reverse.
    """

    data: Group
    tensor: Group | None
    key_value: Group
    tied: Group | None = None


@dataclass(frozen=True)
class _Arriving:
    """A weight on its way with the others of its bucket."""

    bucket: Handle[None]
    weight: Tensor

    @property
    def cover(self) -> int:
        return self.bucket.cover

    def wait(self) -> Tensor:
        self.bucket.wait()
        return self.weight


class Zero:
    """Reduces gradients and gathers weights, bucket by bucket.

    `chunks`: the names of each chunk's parameters, by its index; None: one chunk of all.
    """

    def __init__(
        self,
        state: ParameterState,
        groups: ZeroGroups,
        wire: torch.dtype | None = None,
        chunks: Mapping[int, Collection[str]] | None = None,
    ) -> None:
        self.state, self.groups, self.wire = state, groups, wire
        chunks = {0: {shard.name for shard in state.table}} if chunks is None else chunks
        parameters = [shard.parameter for shard in state.table]
        self._chunks = {
            index: buckets([p for p in parameters if p.name in names])
            for index, names in chunks.items()
        }
        self.buckets = tuple(chain.from_iterable(self._chunks.values()))
        self._bucket_of = {name: names for names in self.buckets for name in names}
        self._missing: dict[Bucket, Counter[str]] = {}
        self._reducing: list[Handle[None]] = []
        state.on_landed = self._landed

    def expect(self, micro_batches: int) -> None:
        """A step begins: every gradient lands so many times before it is complete."""
        self._missing = {bucket: Counter() for bucket in self.buckets}
        for name, parameter in self.state.parameter_of.items():
            self._missing[self._bucket_of[parameter]][name] = micro_batches

    def reduce(self, chunk: int) -> None:
        """Say that the reductions of a chunk's gradients are under way.

        Raises:
            RuntimeError: a gradient has not landed as often as it should, which is a bug.
        """
        missing = [name for b in self._chunks[chunk] for name in self._missing.get(b, ())]
        if missing:
            raise RuntimeError(f"chunk {chunk}: gradients have not landed for {sorted(missing)}")

    def finish_gradients(self) -> None:
        """Wait until this data rank's rows of every gradient are the sum over all ranks."""
        for chunk in self._chunks:
            self.reduce(chunk)
        for handle in self._reducing:
            handle.wait()
        self._reducing.clear()
        sums = [_sum_over(self.groups.key_value, self._key_value_gradients())]
        if self.groups.tensor is not None:
            sums.append(_sum_over(self.groups.tensor, self._norm_gradients()))
        if self.groups.tied is not None:
            sums.append(_sum_over(self.groups.tied, [self.state.own_gradients[EMBEDDING]]))
        for total in sums:
            total.finish()

    @contextmanager
    def changing_masters(self) -> Iterator[None]:
        """Masters may change within; then the weights follow, on their way to every data rank."""
        with self.changing_weights():
            yield
            self.state.round_masters()

    @contextmanager
    def changing_weights(self) -> Iterator[None]:
        """This data rank's rows of the weights may change within; then all leave for the others."""
        for handle in self.state.arriving.values():
            handle.wait()  # they may be what is still being sent
        self.state.arriving.clear()
        yield
        for bucket in self.buckets:
            tensors = [self.state.padded_weights[name] for name in bucket]
            arrival = _Once(self.groups.data.all_gather_rows(tensors))
            for name in bucket:
                self.state.arriving[name] = _Arriving(arrival, self.state.weights[name])
        if self.state.parameter_of.get(OUTPUT) == EMBEDDING:
            self.state.arriving[OUTPUT] = self.state.arriving[EMBEDDING]

    def _landed(self, name: str) -> None:
        bucket = self._bucket_of[self.state.parameter_of[name]]
        missing = self._missing[bucket]
        missing[name] -= 1
        if not missing[name]:
            del missing[name]
        if not missing:
            del self._missing[bucket]
            self._reduce(bucket)

    def _reduce(self, bucket: Bucket) -> None:
        if EMBEDDING in bucket:
            self.state.fold_tied_gradient()
        gradients = [self.state.padded_gradients[name] for name in bucket]
        if self.wire is not None and len(self._reducing) > 1:
            self._reducing.pop(0).wait()  # copies in the wire's dtype live as long as the handle
        self._reducing.append(self.groups.data.reduce_scatter_rows(gradients, self.wire))

    def _norm_gradients(self) -> list[Tensor]:
        table = self.state.table
        return [self.state.own_gradients[s.name] for s in table if s.parameter.shard_dim is None]

    def _key_value_gradients(self) -> list[Tensor]:
        """What this rank has of heads that are held by several ranks."""
        pieces = self.state.pieces(self.state.own_gradients)
        return [gradient for piece, gradient in pieces if piece.part.heads and piece.copies > 1]


class _Once:
    """A handle that several wait for."""

    def __init__(self, handle: Handle[None]) -> None:
        self._handle: Handle[None] | None = handle
        self.cover = handle.cover

    def wait(self) -> None:
        if self._handle:
            self._handle.wait()
            self._handle, self.cover = None, 0


@dataclass(frozen=True)
class _Sum:
    """An all-reduce of several tensors under way."""

    tensors: Sequence[Tensor]
    total: Handle[Tensor] | None

    def finish(self) -> None:
        """Put the sums in place of the parts."""
        if self.total is None:
            return
        pieces = self.total.wait().split([t.numel() for t in self.tensors])
        for tensor, piece in zip(self.tensors, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))


def _sum_over(group: Group, tensors: Sequence[Tensor]) -> _Sum:
    if group.size == 1 or not tensors:
        return _Sum(tensors, None)
    return _Sum(tensors, group.all_reduce(torch.cat([t.flatten() for t in tensors])))
