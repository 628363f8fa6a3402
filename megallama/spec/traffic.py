"""The collectives of a training step: calls and bytes that a rank sends, from the config alone.

Bytes are those of `megallama.dist.traffic`, which counts what a real step issues; a test holds the
two together exactly. T tokens of a micro-batch, D model width, n tensor ranks, e bytes an element.

In short, for one micro-batch and n tensor ranks with sequence parallelism, where one all-gather or
reduce-scatter of the residual stream (T, D) sends (n-1)·T·D·e/n bytes:

    layer, forward     2 all-gathers, 2 reduce-scatters
    layer, backward    4 all-gathers, 2 reduce-scatters; 5 and 3 under `layer_input`
    split, B           2 all-gathers, 2 reduce-scatters, and what the policy recomputes
    split, W           4 all-gathers
    embedding          1 reduce-scatter forward, 1 all-gather backward
    head               1 all-gather, 1 reduce-scatter, the loss's statistics; nothing backward

Without it a layer has 2 all-reduces forward and 2 backward, of 2·(n-1)·T·D·e/n bytes each, and W
none. Between pipeline ranks a micro-batch's shard of the stream travels, T·D·e/n bytes (without
sequence parallelism T·D·e), once in each direction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from math import prod

from megallama.config.schema import Config
from megallama.spec.buckets import buckets
from megallama.spec.collectives import (
    NOTHING,
    Count,
    Stream,
    Traffic,
    all_gather,
    all_reduce,
    reduce_scatter,
    sharded_bytes,
)
from megallama.spec.grid import Place
from megallama.spec.groups import TIED, link_name, run_schedule
from megallama.spec.logits import CHUNK_BYTES, chunk_count
from megallama.spec.memory import ITEMSIZE
from megallama.spec.parameters import EMBEDDING, parameter_table
from megallama.spec.saved import POLICIES
from megallama.spec.schedules.actions import Action, Receive, Send, passes
from megallama.spec.shards import Shard, vocab_rows
from megallama.spec.stages import Chunk, has_tied_copy, rank_tables

#: What the loop asks of every rank in a step's sum: damaged copies, another writer, a profile,
#: stop, interrupt, out of time.
REQUESTS = 6
#: The step's sum is in fp64.
SUM_ITEMSIZE = 8


# The passes over a micro-batch.


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


def layer_backward_activations(stream: Stream, policy: str) -> Traffic:
    """B: 2 gathers and 2 scatters, and what the policy recomputes.

    As `layer_backward` without the gathers for weight gradients, n1 and n2; gate and up, where they
    are not saved, need n2 whole.
    """
    again = NOTHING if "gate_up" in POLICIES[policy] else stream.gather()
    both = 2 * stream.gather() + 2 * stream.scatter_gradient()
    return both + again + recompute(stream, policy)


def layer_backward_weights(stream: Stream) -> Traffic:
    """W: 4 gathers, of dz, n2, dx2 and n1, whose shards B left."""
    return 4 * stream.gather()


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

    The gradient is made in the forward, chunk by chunk of logits, but scattered whole. The backward
    has nothing: that of the final norm works on this rank's tokens.
    """
    return stream.gather() + loss_statistics(stream, loss_chunks) + stream.scatter_gradient()


def loss_statistics(stream: Stream, loss_chunks: int) -> Traffic:
    """`loss_chunks` all-gathers, (n-1)·2·T·max(e, 4) bytes in all, sequence parallel or not.

    Of every token the log of the sum over this rank's share of the vocabulary, and the target's
    logit; in fp32 or wider.
    """
    if stream.ranks == 1:
        return NOTHING
    sent = sharded_bytes(stream.ranks, 2 * stream.tokens * max(stream.itemsize, 4))
    return Traffic({("tensor", "all_gather"): Count(loss_chunks, sent)})


def chunk_pass(kind: str, chunk: Chunk, stream: Stream, policy: str, loss_chunks: int) -> Traffic:
    """A pass of a chunk over a micro-batch; `kind`: F, BW, or the split B and W."""
    layers = len(chunk.layers)
    if kind == "F":
        before = embedding_forward(stream) if chunk.embedding else NOTHING
        after = head_forward(stream, loss_chunks) if chunk.head else NOTHING
        return before + layers * layer_forward(stream) + after
    if kind == "B":
        return layers * layer_backward_activations(stream, policy)
    a_layer = layer_backward(stream, policy) if kind == "BW" else layer_backward_weights(stream)
    return layers * a_layer + (embedding_backward(stream) if chunk.embedding else NOTHING)


def messages(actions: Sequence[Action], rank: int, stream: Stream) -> Traffic:
    """What pipeline rank `rank` sends to others and receives; receiving sends no bytes."""
    total = NOTHING
    for action in actions:
        if isinstance(action, Send):
            key = (link_name(rank, action.peer), "send")
            total += Traffic({key: Count(1, stream.shard())})
        elif isinstance(action, Receive):
            total += Traffic({(link_name(action.peer, rank), "receive"): Count(1, 0)})
    return total


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


def summed_tied_embedding(table: Sequence[Shard], itemsize: int) -> Traffic:
    """One all-reduce of this data rank's rows of the embedding, between its rank and its copy's.

    Where they are two: each has the gradient of one use of the weight.
    """
    own = sum(prod(shard.own_shape) for shard in table if shard.name == EMBEDDING)
    return all_reduce(TIED, 2, own, itemsize) if own else NOTHING


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
    itemsize = ITEMSIZE[config.train.precision]
    tables = (table for _, table in rank_tables(config, place))
    return sum((gathered_weights(table, place.grid.data, itemsize) for table in tables), NOTHING)


def step_traffic(
    config: Config,
    place: Place,
    device: str,
    *,
    requests: int = REQUESTS,
    layer_norms: bool = False,
    updates: int = 1,
) -> Traffic:
    """What the rank at `place` sends in a step.

    `device`: "cpu" or "cuda", which decides the chunks of the loss. `updates`: how often the
    weights changed; 0 where the step was left out, 2 where an early update was taken back.
    """
    train, grid = config.train, place.grid
    parameters = len(parameter_table(config.model))
    logged = config.model.layers if layer_norms else 0
    total = pass_traffic(config, place, device) + _gradient_sums(config, place)
    total += step_sum(grid.size, train.global_batch, parameters, logged, requests)
    if config.parallel.early_step:  # the step's valid tokens, before anything else
        total += all_reduce("data", grid.data, 1, SUM_ITEMSIZE)
    return total + updates * initial_traffic(config, place)


def pass_traffic(config: Config, place: Place, device: str) -> Traffic:
    """What a rank sends in the passes of a step, and between them."""
    stream, rank = stream_of(config), place.along("pipeline")
    rows = vocab_rows(config.model.vocab, place.grid.tensor)
    loss_chunks = chunk_count(stream.tokens, rows, stream.itemsize, CHUNK_BYTES[device])
    chunks = {chunk.index: chunk for chunk, _ in rank_tables(config, place)}
    actions = run_schedule(config, place.grid).actions[rank]
    total = messages(actions, rank, stream)
    for (kind, index), times in Counter((p.kind, p.chunk) for p in passes(actions)).items():
        policy = config.train.saved_activations
        total += times * chunk_pass(kind, chunks[index], stream, policy, loss_chunks)
    return total


def _gradient_sums(config: Config, place: Place) -> Traffic:
    """Over the data ranks, then over the ranks that hold the same rectangle."""
    parallel, grid = config.parallel, place.grid
    wide = max(ITEMSIZE[config.train.precision], 4)
    wire = 2 if parallel.gradient_wire == "bf16" else wide
    tables = [table for _, table in rank_tables(config, place)]
    total = sum((reduced_gradients(table, grid.data, wire) for table in tables), NOTHING)
    table = tuple(chain.from_iterable(tables))
    sharing = len(place.groups(config.model.kv_heads)["key_value"])
    total += summed_key_value_heads(table, sharing, wide)
    if parallel.sequence_parallel:
        total += summed_norms(table, grid.tensor, wide)
    if has_tied_copy(config, grid):
        total += summed_tied_embedding(table, wide)
    return total
