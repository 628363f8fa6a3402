"""What a step does besides its passes: gradients between data ranks, sums, update, new weights.

As `parallel.zero` and `train.step` do it: a bucket's gradients leave when the last of them has
landed, the weights of all buckets leave after the update and are waited for where a forward first
asks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megallama.config.schema import Config
from megallama.plan.chunk import Part
from megallama.plan.costs import Costs
from megallama.plan.ops import Collective, Move
from megallama.spec.grid import Grid
from megallama.spec.memory import ITEMSIZE
from megallama.spec.shards import vocab_rows
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
        model, tensor = self.config.model, self.grid.tensor
        vocab = vocab_rows(model.vocab, tensor), model.d_model
        norms = [(model.d_model,)] * (2 * part.layers + part.head)
        ends = [*norms, *([vocab] if part.embedding else [])]
        own_output = part.head and not (model.tie_embeddings and part.embedding)
        output = self._bucket(vocab) if own_output else None
        return Buckets(self._bucket(*ends), self._layer, part.layers, output)

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
        return Collective("data", "all_gather_rows", n, (n - 1) * self.itemsize * bucket.own)

    def reduce(self, bucket: Bucket) -> Collective:
        n = self.grid.data
        return Collective("data", "reduce_scatter_rows", n, (n - 1) * self.wire * bucket.own)

    def seconds(self, collective: Collective) -> float:
        """On the grid: data ranks stand `tensor` ranks apart."""
        stride = self.grid.tensor if collective.group == "data" else 1
        return self.costs.collective(collective, stride)

    def sums(self, parts: Sequence[Part]) -> float:
        """From the last gradient to the step's verdict: small sums over the ranks that hold the
        same rectangle, the squared norms, the sum over all ranks."""
        config, tensor, world = self.config, self.grid.tensor, self.grid.size
        buckets = [bucket for part in parts for bucket in self.buckets(part).all]
        own = sum(bucket.own for bucket in buckets)
        seconds = self.costs.compute(Move("norms", "optimizer", own * self.wide))
        seconds += self._launches(sum(bucket.tensors for bucket in buckets))
        if tensor > 1 and config.parallel.sequence_parallel:
            elements = sum(2 * part.layers + part.head for part in parts)
            elements *= -(-config.model.d_model // self.grid.data)
            size = 2 * (tensor - 1) * -(-elements // tensor) * self.wide
            seconds += self.seconds(Collective("tensor", "all_reduce", tensor, size))
        elements = 3 * config.train.global_batch + 6 * config.model.layers + 3 + REQUESTS
        size = 2 * (world - 1) * -(-elements // world) * SUM_ITEMSIZE
        return seconds + self.seconds(Collective("world", "all_reduce", world, size))

    def update(self, parts: Sequence[Part]) -> float:
        """AdamW over this data rank's rows, and the gradients set to zero."""
        buckets = [bucket for part in parts for bucket in self.buckets(part).all]
        own, local = sum(b.own for b in buckets), sum(b.local for b in buckets)
        masters = ADAMW_READS + ADAMW_WRITES if self.itemsize < self.wide else 5
        size = own * ((masters + 1) * self.wide + self.itemsize) + local * self.wide
        tensors = sum(bucket.tensors for bucket in buckets)
        return self.costs.compute(Move("AdamW", "optimizer", size)) + self._launches(tensors)

    def _launches(self, tensors: int) -> float:
        return tensors * self.costs.hardware.memory.kernel_seconds
