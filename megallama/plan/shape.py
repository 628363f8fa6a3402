"""The sizes of a micro-batch's tensors on one rank, and its tokens' collectives.

Shapes as in `autograd.layer`: T tokens, t of this rank's shard, D model width, h, f and v this
rank's share of the projections' columns, of the feed-forward width and of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from megallama.config.schema import Config
from megallama.plan.ops import Collective, Pass, Start, Wait
from megallama.spec.collectives import all_reduce_bytes, sharded_bytes
from megallama.spec.logits import CHUNK_BYTES, chunk_length
from megallama.spec.memory import ITEMSIZE
from megallama.spec.saved import POLICIES
from megallama.spec.shards import vocab_rows

#: Covers of an all-gather or a reduce-scatter, and of an all-reduce (`dist.group`).
COVER, COVER_ALL_REDUCE = 1, 2


@dataclass(frozen=True)
class Shape:
    """`length`: of a sequence. `heads`: columns of queries; `qkv`: of the whole projection;
    `rotated`: of queries and keys. `loss_tokens`: of a chunk of logits. `blocks`: every collective
    is waited for where it is started (`dist.group.Blocking`)."""

    tokens: int
    length: int
    width: int
    heads: int
    rotated: int
    qkv: int
    ffn: int
    vocab: int
    loss_tokens: int
    ranks: int
    sequence_parallel: bool
    chunks: int
    itemsize: int
    blocks: bool
    policy: str

    @property
    def saves(self) -> frozenset[str]:
        return POLICIES[self.policy]

    @property
    def rows(self) -> int:
        """t."""
        return self.tokens // self.ranks if self.sequence_parallel else self.tokens

    def stream(self, rows: int, times: int = 1) -> int:
        """Bytes of `times` tensors (rows, D)."""
        return times * rows * self.width * self.itemsize

    # As `parallel.tokens.TokenShards`: each starts a collective and returns what to wait for.

    def gather_chunk(self) -> Pass[Wait]:
        return (yield from self._gather(1))

    def scatter_chunk(self) -> Pass[Wait]:
        if self.sequence_parallel:
            return (yield from self._scatter(1))
        return (yield from self._all_reduce(self.chunks))

    def gather(self) -> Pass[Wait]:
        return (yield from self._gather(self.chunks))

    def scatter(self) -> Pass[Wait]:
        if self.sequence_parallel:
            return (yield from self._scatter(self.chunks))
        return (yield from self._all_reduce(1))

    def gather_statistics(self, tokens: int) -> Pass[Wait]:
        """Two numbers of every token of a chunk, in fp32 or wider."""
        size = sharded_bytes(self.ranks, 2 * tokens * max(self.itemsize, 4))
        return (yield from self._start("all_gather", size, 1, COVER))

    def _gather(self, count: int) -> Pass[Wait]:
        if not self.sequence_parallel:
            return Wait()
        return (yield from self._start("all_gather", self._chunk_sent(), count, COVER))

    def _scatter(self, count: int) -> Pass[Wait]:
        return (yield from self._start("reduce_scatter", self._chunk_sent(), count, COVER))

    def _chunk_sent(self) -> int:
        whole = self.stream(self.tokens // self.chunks)
        return sharded_bytes(self.ranks, whole // self.ranks)

    def _all_reduce(self, chunks: int) -> Pass[Wait]:
        elements = self.tokens // chunks * self.width
        size = all_reduce_bytes(self.ranks, elements, self.itemsize)
        return (yield from self._start("all_reduce", size, 1, COVER_ALL_REDUCE))

    def _start(self, operation: str, size: int, count: int, cover: int) -> Pass[Wait]:
        started: tuple[Start, ...] = ()
        if self.ranks > 1:
            each = Collective("tensor", operation, self.ranks, size)
            started = tuple(Start(each) for _ in range(count))
            for one in started:
                yield one
                if self.blocks:
                    yield Wait((one,))
        return Wait() if self.blocks else Wait(started, cover)


def shape_of(config: Config, device: str) -> Shape:
    """Of a run's micro-batches on one of its ranks; `device`: "cpu" or "cuda"."""
    model, train, parallel = config.model, config.train, config.parallel
    tensor, itemsize = parallel.tensor, ITEMSIZE[train.precision]
    heads, keys = model.heads // tensor, max(1, model.kv_heads // tensor)
    tokens = train.micro_batch * train.sequence_length
    rows = vocab_rows(model.vocab, tensor)
    return Shape(
        tokens=tokens,
        length=train.sequence_length,
        width=model.d_model,
        heads=heads * model.head_width,
        rotated=(heads + keys) * model.head_width,
        qkv=(heads + 2 * keys) * model.head_width,
        ffn=model.ffn // tensor,
        vocab=rows,
        loss_tokens=chunk_length(tokens, rows, itemsize, CHUNK_BYTES[device]),
        ranks=tensor,
        sequence_parallel=parallel.sequence_parallel,
        chunks=parallel.forward_chunks,
        itemsize=itemsize,
        blocks=parallel.overlap == "none",
        policy=train.saved_activations,
    )
