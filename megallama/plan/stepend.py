"""What a step does besides its passes: gradients between data ranks, sums, update, new weights.

As `parallel.zero` and `train.step` do it: a bucket's gradients leave when the last of them has
landed, the weights of all buckets leave after the update and are waited for where a forward first
asks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megallama.config.schema import Config
from megallama.plan.chunk import Part
from megallama.plan.costs import Costs
from megallama.plan.ops import Collective, Move
from megallama.spec.collectives import all_reduce_bytes, sharded_bytes
from megallama.spec.grid import Grid
from megallama.spec.groups import TIED
from megallama.spec.memory import ITEMSIZE
from megallama.spec.replicas import CHECKSUM, STATES
from megallama.spec.shards import vocab_rows
from megallama.spec.stages import has_tied_copy
from megallama.spec.traffic import REQUESTS, SUM_ITEMSIZE

#: Bytes that AdamW moves an element beside the weights: master, two moments and their updates.
ADAMW_READS, ADAMW_WRITES = 3, 3


@dataclass(frozen=True)
class Bucket:
    """Parameters that travel together: elements of this tensor rank, and of this data rank's rows
    of them, padding included; `tensors`: how many they are."""

    local: int
    own: int
    tensors: int


@dataclass(frozen=True)
class Buckets:
    """Of a chunk, in the order of the forward: norms and embedding, layer by layer, the output."""

    ends: Bucket
    layer: Bucket
    layers: int
    output: Bucket | None

    @cached_property
    def all(self) -> list[Bucket]:
        found = [self.ends, *[self.layer] * self.layers]
        return found if self.output is None else [*found, self.output]


class Shared(NamedTuple):
    """Rows of keys and values, and in how many pieces."""

    rows: int
    pieces: int


class StepEnd:
    """The sizes and times of one run's steps on a machine."""

    def __init__(self, config: Config, grid: Grid, costs: Costs) -> None:
        self.config, self.grid, self.costs = config, grid, costs
        self.itemsize = ITEMSIZE[config.train.precision]
        self.wide = max(self.itemsize, 4)
        self._buckets: dict[Part, Buckets] = {}
        self.wire = 2 if config.parallel.gradient_wire == "bf16" else self.wide

    def buckets(self, part: Part) -> Buckets:
        """A chunk's."""
        found = self._buckets.get(part)
        if found is None:
            found = self._buckets[part] = self._of_chunk(part)
        return found

    def _of_chunk(self, part: Part) -> Buckets:
        model = self.config.model
        norms = [(model.d_model,)] * (2 * part.layers + part.head)
        ends = [*norms, *([self._vocab] if part.embedding else [])]
        own_output = part.head and (self._copies or not model.tie_embeddings)
        output = self._embedding if own_output else None
        return Buckets(self._bucket(*ends), self._layer, part.layers, output)

    @property
    def _vocab(self) -> tuple[int, int]:
        """The shape of the embedding and of the output projection on a tensor rank."""
        model = self.config.model
        return vocab_rows(model.vocab, self.grid.tensor), model.d_model

    @cached_property
    def _embedding(self) -> Bucket:
        return self._bucket(self._vocab)

    @cached_property
    def _layer(self) -> Bucket:
        model, tensor = self.config.model, self.grid.tensor
        d, ffn = model.d_model, model.ffn // tensor
        heads = model.heads // tensor * model.head_width
        keys = max(1, model.kv_heads // tensor) * model.head_width
        return self._bucket((heads + 2 * keys, d), (d, heads), (2 * ffn, d), (d, ffn))

    def _bucket(self, *shapes: tuple[int, ...]) -> Bucket:
        columns = [shape[1] if len(shape) == 2 else 1 for shape in shapes]
        own = sum(-(-s[0] // self.grid.data) * c for s, c in zip(shapes, columns, strict=True))
        local = sum(s[0] * c for s, c in zip(shapes, columns, strict=True))
        return Bucket(local, own, len(shapes))

    def gather(self, bucket: Bucket) -> Collective:
        n = self.grid.data
        size = sharded_bytes(n, self.itemsize * bucket.own)
        return Collective("data", "all_gather_rows", n, size)

    def reduce(self, bucket: Bucket) -> Collective:
        n = self.grid.data
        size = sharded_bytes(n, self.wire * bucket.own)
        return Collective("data", "reduce_scatter_rows", n, size)

    def seconds(self, collective: Collective) -> float:
        """On the grid: data ranks stand `tensor` ranks apart, the ends of a pipeline as many as
        there are between them."""
        tensor, data, pipeline = self.grid.tensor, self.grid.data, self.grid.pipeline
        strides = {"data": tensor, TIED: tensor * data * (pipeline - 1)}
        return self.costs.collective(collective, strides.get(collective.group, 1))

    def reductions(self, parts: Sequence[Part]) -> list[Collective]:
        """What is summed from the last bucket of gradients to the step's verdict: between ranks
        that hold the same rectangle, and over all; of an early step the valid tokens, too."""
        parallel, grid = self.config.parallel, self.grid
        elements = self._shared.rows * self._layers(parts) * self.config.model.d_model
        found = [self._all_reduce("key_value", self._sharing, elements, self.wide)]
        if parallel.sequence_parallel:
            elements = self._norms(parts) * -(-self.config.model.d_model // grid.data)
            found.append(self._all_reduce("tensor", grid.tensor, elements, self.wide))
        if self._tied(parts):
            found.append(self._all_reduce(TIED, 2, self._embedding.own, self.wide))
        if parallel.early_step:
            found.append(self._all_reduce("data", grid.data, 1, SUM_ITEMSIZE))
        model, samples = self.config.model, self.config.train.global_batch
        elements = 3 * samples + 6 * model.layers + 3 - model.tie_embeddings + REQUESTS
        found.append(self._all_reduce("world", grid.size, elements, SUM_ITEMSIZE))
        return [one for one in found if one.bytes]

    def comparisons(self, parts: Sequence[Part]) -> list[Collective]:
        """The checksums that ranks exchange of what they hold alike (`train.replicas`)."""
        data, tensor = self.grid.data, self.grid.tensor
        copies = self._norms(parts) + self._shared.pieces * self._layers(parts)
        found = [
            self._checksums("data", data, sum(b.tensors for b in self._buckets_of(parts))),
            self._checksums("tensor", tensor, STATES * copies),
        ]
        if self._tied(parts):
            found.append(self._checksums(TIED, 2, STATES))
        return [one for one in found if one.bytes]

    def sums(self, parts: Sequence[Part]) -> float:
        """From the last gradient to the step's verdict: the reductions, the squared norms, and the
        comparison's share of a step."""
        own = sum(bucket.own for bucket in self._buckets_of(parts))
        seconds = self.costs.compute(Move("norms", "optimizer", own * self.wide))
        seconds += self._launches(sum(bucket.tensors for bucket in self._buckets_of(parts)))
        seconds += sum(map(self.seconds, self.reductions(parts)))
        every = self.config.train.check_replicas_every
        return seconds + (self._comparison(parts) / every if every else 0.0)

    def _comparison(self, parts: Sequence[Part]) -> float:
        """Weights and the masters that they were rounded from are read once: two sums a tensor, and
        one rounding."""
        if self.grid.data == 1 and self.itemsize == self.wide:
            return sum(map(self.seconds, self.comparisons(parts)))
        buckets = self._buckets_of(parts)
        own, local = sum(b.own for b in buckets), sum(b.local for b in buckets)
        size = own * (self.wide + 2 * self.itemsize) + local * self.itemsize
        seconds = self.costs.compute(Move("checksums", "plain", size))
        seconds += self._launches(3 * sum(bucket.tensors for bucket in buckets))
        return seconds + sum(map(self.seconds, self.comparisons(parts)))

    def update(self, parts: Sequence[Part]) -> float:
        """AdamW over this data rank's rows, and the gradients set to zero."""
        buckets = self._buckets_of(parts)
        own, local = sum(b.own for b in buckets), sum(b.local for b in buckets)
        masters = ADAMW_READS + ADAMW_WRITES if self.itemsize < self.wide else 5
        size = own * ((masters + 1) * self.wide + self.itemsize) + local * self.wide
        tensors = sum(bucket.tensors for bucket in buckets)
        return self.costs.compute(Move("AdamW", "optimizer", size)) + self._launches(tensors)

    def _launches(self, tensors: int) -> float:
        return tensors * self.costs.hardware.memory.kernel_seconds

    def _buckets_of(self, parts: Sequence[Part]) -> list[Bucket]:
        return [bucket for part in parts for bucket in self.buckets(part).all]

    def _layers(self, parts: Sequence[Part]) -> int:
        return sum(part.layers for part in parts)

    def _norms(self, parts: Sequence[Part]) -> int:
        return sum(2 * part.layers + part.head for part in parts)

    def _tied(self, parts: Sequence[Part]) -> bool:
        """Whether these are of the embedding's rank or of the head's, which holds a copy."""
        ends = any(part.embedding or part.head for part in parts)
        return ends and self._copies

    @cached_property
    def _copies(self) -> bool:
        return has_tied_copy(self.config, self.grid)

    @cached_property
    def _sharing(self) -> int:
        """Tensor ranks that hold the same key/value heads."""
        return max(1, self.grid.tensor // self.config.model.kv_heads)

    @cached_property
    def _shared(self) -> Shared:
        """Of a layer's queries, keys and values, stacked, data ranks have runs of rows; the most
        that one of them has of keys and values that other tensor ranks hold, too."""
        if self._sharing == 1:
            return Shared(0, 0)
        model, data = self.config.model, self.grid.data
        width, queries = model.head_width, model.heads // self.grid.tensor * model.head_width
        rows = queries + 2 * width
        own = -(-rows // data)
        held = [
            [_overlap(first, own, begin, width) for begin in (queries, queries + width)]
            for first in range(queries // own * own, rows, own)
        ]
        return Shared(max(map(sum, held)), max(sum(map(bool, both)) for both in held))

    def _all_reduce(self, group: str, n: int, elements: int, itemsize: int) -> Collective:
        return Collective(group, "all_reduce", n, all_reduce_bytes(n, elements, itemsize))

    def _checksums(self, group: str, n: int, count: int) -> Collective:
        return Collective(group, "all_gather", n, sharded_bytes(n, count * CHECKSUM))


def _overlap(begin: int, count: int, other: int, others: int) -> int:
    """How many of `count` rows from `begin` on are among the `others` from `other` on."""
    return max(0, min(begin + count, other + others) - max(begin, other))
