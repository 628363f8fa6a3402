"""The collectives of a training step: calls and bytes that a rank sends, from the config alone.

Bytes are those of `megallama.dist.traffic`, which counts what a real step issues; a test holds the
two together exactly. T tokens of a micro-batch, D model width, n tensor ranks, e bytes an element.

In short, for one micro-batch and n tensor ranks with sequence parallelism, where one all-gather or
reduce-scatter of the residual stream (T, D) sends (n-1)·T·D·e/n bytes:

    layer, forward     2 all-gathers, 2 reduce-scatters
    layer, backward    4 all-gathers, 2 reduce-scatters; 5 and 3 under `layer_input`
    embedding          1 reduce-scatter forward, 1 all-gather backward
    head               1 all-gather, 1 reduce-scatter, the loss's statistics; nothing backward

Without it a layer has 2 all-reduces forward and 2 backward, of 2·(n-1)·T·D·e/n bytes each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from megallama.config.schema import Config
from megallama.spec.buckets import buckets
from megallama.spec.grid import Place
from megallama.spec.logits import CHUNK_BYTES, chunk_count
from megallama.spec.memory import ITEMSIZE
from megallama.spec.parameters import parameter_table
from megallama.spec.saved import POLICIES
from megallama.spec.shards import Shard, shard_table, vocab_rows

#: What the loop asks of every rank in a step's sum: stop, interrupt, out of time.
REQUESTS = 3
#: The step's sum is in fp64.
SUM_ITEMSIZE = 8


class Count(NamedTuple):
    """How often an operation is issued, and the bytes that one rank sends for it."""

    calls: int
    bytes: int


@dataclass(frozen=True)
class Traffic:
    """Counts by (group name, operation). Groups of one rank do not occur."""

    counts: Mapping[tuple[str, str], Count] = field(default_factory=dict)

    def __add__(self, other: Traffic) -> Traffic:
        total = dict(self.counts)
        for key, count in other.counts.items():
            held = total.get(key, Count(0, 0))
            total[key] = Count(held.calls + count.calls, held.bytes + count.bytes)
        return Traffic(total)

    def __rmul__(self, times: int) -> Traffic:
        """So many times the same."""
        return Traffic({k: Count(times * c.calls, times * c.bytes) for k, c in self.counts.items()})


NOTHING = Traffic()


# One collective each; `n` ranks.


def all_gather(group: str, n: int, shard: int, rows: bool = False) -> Traffic:
    """(n-1) · the bytes of a rank's shard; `rows` is the coalesced operation of a bucket."""
    return _one(group, "all_gather_rows" if rows else "all_gather", n, (n - 1) * shard)


def reduce_scatter(group: str, n: int, shard: int, rows: bool = False) -> Traffic:
    """(n-1) · the bytes of the shard that a rank keeps, as they travel."""
    return _one(group, "reduce_scatter_rows" if rows else "reduce_scatter", n, (n - 1) * shard)


def all_reduce(group: str, n: int, elements: int, itemsize: int) -> Traffic:
    """2·(n-1)·⌈elements/n⌉·itemsize: a reduce-scatter, then an all-gather."""
    return _one(group, "all_reduce", n, 2 * (n - 1) * -(-elements // n) * itemsize)


def _one(group: str, operation: str, n: int, sent: int) -> Traffic:
    return Traffic({(group, operation): Count(1, sent)}) if n > 1 else NOTHING


# The passes over a micro-batch.


@dataclass(frozen=True)
class Stream:
    """The residual stream of a micro-batch, (T, D), as the `ranks` tensor ranks share it.

    `itemsize` is the compute dtype's; `chunks` those of the forward.
    """

    tokens: int
    width: int
    itemsize: int
    ranks: int
    sequence_parallel: bool = True
    chunks: int = 1

    def gather(self) -> Traffic:
        """From shards to the whole, chunk by chunk: `chunks` all-gathers, (n-1)·T·D·e/n in all.

        Nothing without sequence parallelism: every rank has all tokens already.
        """
        if not self.sequence_parallel:
            return NOTHING
        return self.chunks * all_gather("tensor", self.ranks, self._chunk() // self.ranks)

    def scatter(self) -> Traffic:
        """From the ranks' parts to the sum, chunk by chunk, (n-1)·T·D·e/n in all.

        Without sequence parallelism the sum is whole on every rank: all-reduces of twice the bytes.
        """
        if not self.sequence_parallel:
            return self.chunks * self._all_reduce(self.chunks)
        return self.chunks * reduce_scatter("tensor", self.ranks, self._chunk() // self.ranks)

    def scatter_gradient(self) -> Traffic:
        """As `scatter`, but an all-reduce is not cut in chunks.

        The backward takes all tokens at once. Under sequence parallelism its collectives still go
        by the forward's chunks, because a rank's shard is one run of tokens of each.
        """
        return self.scatter() if self.sequence_parallel else self._all_reduce(chunks=1)

    def _chunk(self) -> int:
        """Bytes of a chunk."""
        return self.tokens // self.chunks * self.width * self.itemsize

    def _all_reduce(self, chunks: int) -> Traffic:
        elements = self.tokens // chunks * self.width
        return all_reduce("tensor", self.ranks, elements, self.itemsize)


def layer_forward(stream: Stream) -> Traffic:
    """2 gathers and 2 scatters: n1 before Wqkv, n2 before W13; what Wo and W2 return."""
    return 2 * stream.gather() + 2 * stream.scatter()


def layer_backward(stream: Stream, policy: str) -> Traffic:
    """4 gathers and 2 scatters, and what the policy recomputes.

    Gathered are the gradients of what Wo and W2 returned, dz and dx2, and the inputs of Wqkv and
    W13, n1 and n2, for their weight gradients: shards of these are saved or recomputed, never the
    whole. Scattered are dn1 and dn2, which Wqkv and W13 return.
    """
    return 4 * stream.gather() + 2 * stream.scatter_gradient() + recompute(stream, policy)


def recompute(stream: Stream, policy: str) -> Traffic:
    """A gather where q, k and v are not saved, a scatter where x2 is not: as in the forward.

    Only `layer_input` has them. What else is recomputed follows from tensors that are on the rank:
    attention from q, k and v, gate and up from the n2 that the weight gradient needs anyway.
    """
    saved = POLICIES[policy]
    again = NOTHING if "qkv" in saved else stream.gather()
    return again if "x2" in saved else again + stream.scatter()


def embedding_forward(stream: Stream) -> Traffic:
    """1 scatter: each rank has the rows of its share of the vocabulary and zeros elsewhere."""
    return stream.scatter()


def embedding_backward(stream: Stream) -> Traffic:
    """1 gather: a rank's rows may belong to any token."""
    return stream.gather()


def head_forward(stream: Stream, loss_chunks: int) -> Traffic:
    """1 gather of the final norm's output, the loss's statistics, 1 scatter of its gradient.

    The gradient is made in the forward, chunk by chunk of logits, but scattered whole.
    """
    return stream.gather() + loss_statistics(stream, loss_chunks) + stream.scatter_gradient()


def loss_statistics(stream: Stream, loss_chunks: int) -> Traffic:
    """`loss_chunks` all-gathers, (n-1)·2·T·max(e, 4) bytes in all, sequence parallel or not.

    Of every token the log of the sum over this rank's share of the vocabulary, and the target's
    logit; in fp32 or wider.
    """
    if stream.ranks == 1:
        return NOTHING
    sent = (stream.ranks - 1) * 2 * stream.tokens * max(stream.itemsize, 4)
    return Traffic({("tensor", "all_gather"): Count(loss_chunks, sent)})


def head_backward() -> Traffic:
    """Nothing: the final norm's backward works on this rank's tokens."""
    return NOTHING


def micro_batch(stream: Stream, layers: int, policy: str, loss_chunks: int) -> Traffic:
    """Forward and backward of all layers, the embedding and the head."""
    a_layer = layer_forward(stream) + layer_backward(stream, policy)
    head = head_forward(stream, loss_chunks) + head_backward()
    return embedding_forward(stream) + layers * a_layer + head + embedding_backward(stream)


# Once a step.


def reduced_gradients(table: Sequence[Shard], n: int, itemsize: int) -> Traffic:
    """A reduce-scatter a bucket: (n-1)/n of its padded elements · `itemsize`, the wire's.

    A tied output projection's gradient is added to the embedding's before, and does not travel.
    """
    each = (reduce_scatter("data", n, itemsize * own, rows=True) for own in _own_elements(table))
    return sum(each, NOTHING)


def gathered_weights(table: Sequence[Shard], n: int, itemsize: int) -> Traffic:
    """An all-gather a bucket: (n-1)/n of its padded elements · `itemsize`, the compute dtype's.

    After every update, and once when the initial weights are made; a step that is left out has
    none.
    """
    each = (all_gather("data", n, itemsize * own, rows=True) for own in _own_elements(table))
    return sum(each, NOTHING)


def _own_elements(table: Sequence[Shard]) -> list[int]:
    """Of each bucket, the elements that one data rank holds, padding included."""
    own = {shard.name: prod(shard.own_shape) for shard in table}
    return [sum(own[name] for name in names) for names in buckets([s.parameter for s in table])]


def summed_norms(table: Sequence[Shard], n: int, itemsize: int) -> Traffic:
    """One all-reduce over the tensor ranks of this data rank's rows of all norms' gradients.

    Each normalised its own tokens: only under sequence parallelism. fp32 or wider.
    """
    norms = [shard for shard in table if shard.parameter.shard_dim is None]
    return all_reduce("tensor", n, sum(prod(shard.own_shape) for shard in norms), itemsize)


def summed_key_value_heads(table: Sequence[Shard], n: int, itemsize: int) -> Traffic:
    """One all-reduce over the `n` tensor ranks that hold the same key/value heads.

    Of this data rank's rows, which need not hold a key's or a value's: data ranks divide q, k and v
    stacked, so the first ones may have rows of q only, and then no all-reduce.
    """
    pieces = (piece for shard in table for piece in shard.own_pieces)
    held = sum(prod(p.shape) for p in pieces if p.part.heads and p.copies > 1)
    return all_reduce("key_value", n, held, itemsize) if held else NOTHING


def step_sum(n: int, samples: int, parameters: int, layers: int, requests: int) -> Traffic:
    """The one sum over all ranks: an all-reduce of 3·samples + parameters + layers + requests fp64.

    Loss, valid tokens and source of every sample of the global batch; the squared norm of every
    parameter's gradient; the activations' squares of `layers` where layer norms are logged, else 0;
    what ranks ask for.
    """
    return all_reduce("world", n, 3 * samples + parameters + layers + requests, SUM_ITEMSIZE)


# A whole step.


def stream_of(config: Config) -> Stream:
    """The residual stream of a run's micro-batches."""
    train, parallel = config.train, config.parallel
    return Stream(
        tokens=train.micro_batch * train.sequence_length,
        width=config.model.d_model,
        itemsize=ITEMSIZE[train.precision],
        ranks=parallel.tensor,
        sequence_parallel=parallel.sequence_parallel,
        chunks=parallel.forward_chunks,
    )


def initial_traffic(config: Config, place: Place) -> Traffic:
    """What a rank sends before the first step: its rows of the initial weights."""
    table = shard_table(parameter_table(config.model), place)
    return gathered_weights(table, place.grid.data, ITEMSIZE[config.train.precision])


def step_traffic(
    config: Config,
    place: Place,
    device: str,
    *,
    requests: int = REQUESTS,
    layer_norms: bool = False,
    applied: bool = True,
) -> Traffic:
    """What the rank at `place` sends in a step.

    `device`: "cpu" or "cuda", which decides the chunks of the loss. `applied`: the weights changed.
    """
    model, train, grid = config.model, config.train, place.grid
    stream, itemsize = stream_of(config), ITEMSIZE[train.precision]
    rows = vocab_rows(model.vocab, grid.tensor)
    loss_chunks = chunk_count(stream.tokens, rows, itemsize, CHUNK_BYTES[device])
    passes = micro_batch(stream, model.layers, train.saved_activations, loss_chunks)
    table = shard_table(parameter_table(model), place)
    logged = model.layers if layer_norms else 0
    return (
        train.global_batch // (train.micro_batch * grid.data) * passes
        + _gradient_sums(config, place, table)
        + step_sum(grid.size, train.global_batch, len(table), logged, requests)
        + (gathered_weights(table, grid.data, itemsize) if applied else NOTHING)
    )


def _gradient_sums(config: Config, place: Place, table: Sequence[Shard]) -> Traffic:
    """Over the data ranks, then over the tensor ranks that hold the same rectangle."""
    parallel, wide = config.parallel, max(ITEMSIZE[config.train.precision], 4)
    wire = 2 if parallel.gradient_wire == "bf16" else wide
    sharing = len(place.groups(config.model.kv_heads)["key_value"])
    total = reduced_gradients(table, place.grid.data, wire)
    total += summed_key_value_heads(table, sharing, wide)
    if parallel.sequence_parallel:
        total += summed_norms(table, place.grid.tensor, wide)
    return total
