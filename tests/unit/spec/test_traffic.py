"""The traffic's formulas against figures worked out by hand. That a real step sends exactly so:
`tests/layouts/test_traffic.py`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megallama.config.load import parse_config
from megallama.config.schema import Config, Model
from megallama.spec.grid import Grid, Place
from megallama.spec.logits import chunk_count, chunk_length
from megallama.spec.parameters import parameter_table
from megallama.spec.saved import POLICIES
from megallama.spec.shards import shard_table
from megallama.spec.traffic import (
    NOTHING,
    Count,
    Stream,
    Traffic,
    embedding_backward,
    embedding_forward,
    gathered_weights,
    head_forward,
    initial_traffic,
    layer_backward,
    layer_forward,
    micro_batch,
    recompute,
    reduced_gradients,
    step_traffic,
    summed_key_value_heads,
    summed_norms,
)

MIB = 1 << 20
GATHER, SCATTER, REDUCE = (("tensor", o) for o in ("all_gather", "reduce_scatter", "all_reduce"))

#: 65B at tp=8, four sequences of 2048, bf16. The residual stream is 8192 · 8192 · 2 bytes = 128 MiB
#: and a rank's shard of it 16 MiB, which goes to each of 7 others: 112 MiB.
M65 = Stream(tokens=4 * 2048, width=8192, itemsize=2, ranks=8)
ONE = 112 * MIB


def test_a_65b_layer_forward():
    """2 + 2 of 112 MiB: 448 MiB, the bytes of Megatron-LM's two all-reduces."""
    assert layer_forward(M65).counts == {GATHER: Count(2, 2 * ONE), SCATTER: Count(2, 2 * ONE)}
    assert sum(c.bytes for c in layer_forward(M65).counts.values()) == 448 * MIB == 469_762_048


def test_a_65b_layer_backward():
    """4 + 2 of 112 MiB: 672 MiB. Two of the gathers are n1 and n2, whose shards alone are kept."""
    counts = layer_backward(M65, "linear_outputs").counts
    assert counts == {GATHER: Count(4, 4 * ONE), SCATTER: Count(2, 2 * ONE)}
    assert sum(c.bytes for c in counts.values()) == 672 * MIB == 704_643_072


@pytest.mark.parametrize("policy", POLICIES)
def test_only_layer_input_repeats_collectives(policy):
    """The gather before Wqkv and the scatter after Wo, to have x2 again: 224 MiB at 65B."""
    again = {GATHER: Count(1, ONE), SCATTER: Count(1, ONE)} if policy == "layer_input" else {}
    assert recompute(M65, policy).counts == again
    whole = layer_backward(M65, "linear_outputs") + Traffic(again)
    assert layer_backward(M65, policy) == whole


@pytest.mark.parametrize("policy", POLICIES)
def test_two_chunks_double_the_calls_and_not_the_bytes(policy):
    halves = replace(M65, chunks=2)
    for pass_ in (layer_forward, lambda stream: layer_backward(stream, policy)):
        whole, cut = pass_(M65).counts, pass_(halves).counts
        assert cut == {key: Count(2 * c.calls, c.bytes) for key, c in whole.items()}


def test_without_sequence_parallelism_a_layer_has_two_all_reduces_each_way():
    """Each has the bytes of a gather and a scatter: 2 · 112 MiB."""
    stream = replace(M65, sequence_parallel=False)
    two = {REDUCE: Count(2, 4 * ONE)}
    assert layer_forward(stream).counts == layer_backward(stream, "linear_outputs").counts == two
    assert layer_backward(stream, "layer_input").counts == {REDUCE: Count(3, 6 * ONE)}
    # The forward's are in two halves; the backward takes all tokens at once.
    halves = replace(stream, chunks=2)
    assert layer_forward(halves).counts == {REDUCE: Count(4, 4 * ONE)}
    assert layer_backward(halves, "linear_outputs").counts == two
    assert layer_backward(halves, "layer_input").counts == {REDUCE: Count(4, 6 * ONE)}


def test_the_ends_of_the_65b_model():
    """Two fp32 numbers of each of 8192 tokens to 7 ranks: 448 KiB, in as many calls as chunks."""
    assert embedding_forward(M65).counts == {SCATTER: Count(1, ONE)}
    assert embedding_backward(M65).counts == {GATHER: Count(1, ONE)}
    head = {GATHER: Count(1 + 3, ONE + 448 * 1024), SCATTER: Count(1, ONE)}
    assert head_forward(M65, loss_chunks=3).counts == head


def test_a_65b_micro_batch():
    """80 layers · 10 · 112 MiB = 87.5 GiB, the ends' 4 · 112 MiB, the statistics' 448 KiB."""
    counts = micro_batch(M65, 80, "linear_outputs", loss_chunks=1).counts
    assert counts == {
        GATHER: Count(80 * 6 + 1 + 1 + 1, (80 * 6 + 2) * ONE + 448 * 1024),
        SCATTER: Count(80 * 4 + 1 + 1, (80 * 4 + 2) * ONE),
    }


def test_one_tensor_rank_sends_nothing():
    for sequence_parallel in (True, False):
        stream = Stream(4096, 8192, 2, ranks=1, sequence_parallel=sequence_parallel)
        assert micro_batch(stream, 80, "layer_input", loss_chunks=4) == NOTHING


def test_a_65b_layer_s_bucket_over_256_data_ranks():
    """Elements of a tensor rank, rows padded to a multiple of 256, in units of D = 8192:

    Wqkv 3·8192/8 = 3072, Wo 8192/8 = 1024, W13 2·22016/8 = 5504, which is padded to 5632, W2
    22016/8 = 2752: 12480 · 8192 = 102,236,160, of which a rank has 399,360. It sends 255 times
    that: 407,347,200 bytes of fp32 gradients, half in bf16, and 203,673,600 of bf16 weights.
    """
    place = Place(Grid(tensor=8, data=256), rank=0)
    table = shard_table(parameter_table(Model(preset="llama-65b", layers=1)), place)
    layer = [shard for shard in table if shard.parameter.layer == 0 and shard.parameter.decays]
    rows = [shard.padded_rows for shard in layer]
    assert rows == [3072, 8192, 5632, 8192]  # Wo and W2 are divided by columns
    key = ("data", "reduce_scatter_rows")
    assert reduced_gradients(layer, 256, 4).counts == {key: Count(1, 407_347_200)}
    assert reduced_gradients(layer, 256, 2).counts == {key: Count(1, 203_673_600)}
    weights = {("data", "all_gather_rows"): Count(1, 203_673_600)}
    assert gathered_weights(layer, 256, 2).counts == weights


def config(**sections: dict[str, object]) -> Config:
    """A small run; keys replace those of a section."""
    given: dict[str, dict[str, object]] = {
        "run": {"name": "traffic"},
        "model": {"d_model": 32, "layers": 2, "heads": 8, "ffn": 40, "vocab": 64},
        "train": {"steps": 1, "sequence_length": 16, "global_batch": 8, "precision": "fp32"},
        "parallel": {},
        "optimizer": {"lr": 1e-3},
    }
    return parse_config({name: keys | sections.get(name, {}) for name, keys in given.items()})


def places(config: Config, **sizes: int) -> list[Place]:
    grid = Grid(**sizes)
    return [Place(grid, rank) for rank in range(grid.size)]


def test_a_whole_small_step():
    """tp=2, dp=2, 2 layers, 8 samples in 4 micro-batches of one a data rank, fp32.

    The stream: 16·32·4 = 2048 bytes, so one collective of it sends 1024. A micro-batch: gathers
    2·6 + 1 (head) + 1 (embedding) = 14, scatters 2·4 + 2 = 10, and the statistics 2·16·4 = 128.
    Norms: 5 of 32 elements, 16 of each on a data rank: 80, half at a time, twice: 320 bytes.
    Buckets (elements): the embedding 32·32 and the norms 160: 1184; a layer, Wqkv 48·32, Wo 32·16,
    W13 40·32, W2 32·20: 3968; the output 1024. In all 10144, of which the half is sent: 20,288.
    The step's sum: 3·8 + 15 parameters + 3 requests = 42 fp64 over 4 ranks: 2·3·11·8 = 528.
    """
    run = config(parallel={"tensor": 2, "data": 2})
    step = {
        ("tensor", "all_gather"): Count(4 * (14 + 1), 4 * (14 * 1024 + 128)),
        ("tensor", "reduce_scatter"): Count(4 * 10, 4 * 10 * 1024),
        ("tensor", "all_reduce"): Count(1, 320),
        ("data", "reduce_scatter_rows"): Count(4, 20_288),
        ("data", "all_gather_rows"): Count(4, 20_288),
        ("world", "all_reduce"): Count(1, 528),
    }
    for place in places(run, tensor=2, data=2):
        assert step_traffic(run, place, "cpu").counts == step
        left_out = step_traffic(run, place, "cpu", applied=False).counts
        assert left_out == {k: c for k, c in step.items() if k != ("data", "all_gather_rows")}
        assert initial_traffic(run, place).counts == {("data", "all_gather_rows"): Count(4, 20_288)}


def test_only_ranks_that_hold_keys_or_values_sum_them():
    """4 tensor ranks share one key/value head of 4 columns; over 4 data ranks the 16 rows of q, k
    and v, 8 + 4 + 4 of 32, are 4 rows each: q, q, k, v. In each of 2 layers 4·32 elements."""
    run = config(model={"kv_heads": 1}, parallel={"tensor": 4, "data": 4})
    sums = {}
    for place in places(run, tensor=4, data=4):
        table = shard_table(parameter_table(run.model), place)
        traffic = summed_key_value_heads(table, 4, 4)
        sums.setdefault(place.along("data"), []).append(traffic.counts)
    some = {("key_value", "all_reduce"): Count(1, 2 * 3 * (2 * 4 * 32 // 4) * 4)}
    assert sums == {0: [{}] * 4, 1: [{}] * 4, 2: [some] * 4, 3: [some] * 4}


def test_norms_are_summed_with_their_padding():
    """5 norms of 18 elements over 4 data ranks: 5 each, 25 in all; over 2 tensor ranks 13 each."""
    model = Model(d_model=18, layers=2, heads=3, ffn=12, vocab=19)
    table = shard_table(parameter_table(model), Place(Grid(tensor=2, data=4), 3))
    assert summed_norms(table, 2, 4).counts == {("tensor", "all_reduce"): Count(1, 2 * 13 * 4)}


def test_a_single_process_sends_nothing():
    run = config()
    (alone,) = places(run)
    assert step_traffic(run, alone, "cpu", layer_norms=True) == NOTHING
    assert initial_traffic(run, alone) == NOTHING


def test_sums_and_multiples():
    a, b = ("tensor", "all_gather"), ("data", "all_gather_rows")
    one, two = Traffic({a: Count(1, 10)}), Traffic({a: Count(2, 5), b: Count(1, 7)})
    assert (one + two).counts == {a: Count(3, 15), b: Count(1, 7)}
    assert (3 * two).counts == {a: Count(6, 15), b: Count(3, 21)}
    assert one + NOTHING == NOTHING + one == one
    assert one.counts == {a: Count(1, 10)}, "a sum changes what it adds"


@pytest.mark.parametrize(
    "tokens, budget, chunks",
    [(100, 1000, 1), (100, 100, 1), (100, 99, 2), (100, 30, 4), (7, 3, 3), (5, 0, 5)],
)
def test_the_loss_s_chunks_fit_the_budget(tokens, budget, chunks):
    """`budget` in tokens, of 50 rows of 2 bytes; too small a one takes a token at a time."""
    assert chunk_count(tokens, 50, 2, budget * 100) == chunks
    length = chunk_length(tokens, 50, 2, budget * 100)
    assert length <= max(1, budget)
    assert (chunks - 1) * length < tokens <= chunks * length
