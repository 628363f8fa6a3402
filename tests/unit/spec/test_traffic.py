"""The traffic's formulas against figures worked out by hand. That a real step sends exactly so:
`tests/layouts/test_traffic.py`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

from megallama.config.load import parse_config
from megallama.config.schema import Config, Model, Parallel
from megallama.spec.collectives import NOTHING, Count, Stream, Traffic
from megallama.spec.grid import Grid, Place
from megallama.spec.groups import run_schedule
from megallama.spec.logits import chunk_count, chunk_length
from megallama.spec.parameters import parameter_table
from megallama.spec.saved import POLICIES
from megallama.spec.schedules.actions import passes
from megallama.spec.schedules.build import NAMES
from megallama.spec.shards import shard_table
from megallama.spec.stages import Chunk, chunks_of, owners_of
from megallama.spec.traffic import (
    chunk_pass,
    embedding_backward,
    embedding_forward,
    gathered_weights,
    head_forward,
    initial_traffic,
    layer_backward,
    layer_backward_activations,
    layer_backward_weights,
    layer_forward,
    pass_traffic,
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


def micro_batch(stream: Stream, layers: int, policy: str, loss_chunks: int) -> Traffic:
    """Forward and backward of a whole model."""
    whole = Chunk(0, range(layers), embedding=True, head=True)
    passes = (chunk_pass(kind, whole, stream, policy, loss_chunks) for kind in ("F", "BW"))
    return sum(passes, NOTHING)


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


@pytest.mark.parametrize(
    "policy, gathers, scatters",
    [
        ("all", 2, 2),
        ("linear_outputs", 2, 2),
        ("no_attention_output", 2, 2),
        ("no_gate_up", 3, 2),  # n2, to have gate and up again
        ("layer_input", 4, 3),  # and n1, to have q, k and v; and what Wo returned
    ],
)
def test_a_split_backward_at_65b(policy, gathers, scatters):
    """B gathers dz and dx2; W, for its gradients, dz, dx2, n1 and n2."""
    b, w = layer_backward_activations(M65, policy).counts, layer_backward_weights(M65).counts
    assert b == {GATHER: Count(gathers, gathers * ONE), SCATTER: Count(scatters, scatters * ONE)}
    assert w == {GATHER: Count(4, 4 * ONE)}


def test_a_split_backward_without_sequence_parallelism_sends_no_more():
    stream = replace(M65, sequence_parallel=False)
    assert layer_backward_weights(stream) == NOTHING
    for policy in POLICIES:
        assert layer_backward_activations(stream, policy) == layer_backward(stream, policy)


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
    The step's sum: 3·8 + 15 parameters + 6 requests = 45 fp64 over 4 ranks: 2·3·12·8 = 576.
    """
    run = config(parallel={"tensor": 2, "data": 2})
    step = {
        ("tensor", "all_gather"): Count(4 * (14 + 1), 4 * (14 * 1024 + 128)),
        ("tensor", "reduce_scatter"): Count(4 * 10, 4 * 10 * 1024),
        ("tensor", "all_reduce"): Count(1, 320),
        ("data", "reduce_scatter_rows"): Count(4, 20_288),
        ("data", "all_gather_rows"): Count(4, 20_288),
        ("world", "all_reduce"): Count(1, 576),
    }
    for place in places(run, tensor=2, data=2):
        assert step_traffic(run, place, "cpu").counts == step
        left_out = step_traffic(run, place, "cpu", updates=0).counts
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


def pipeline(schedule: str, tensor: int = 2, **parallel: object) -> Config:
    """Eight layers, 8 micro-batches of 16 tokens; one of the stream's collectives sends 1024."""
    return config(
        model={"layers": 8},
        parallel={"tensor": tensor, "pipeline": 2, "schedule": schedule, **parallel},
    )


def test_a_step_of_two_stages():
    """tp=2, pp=2, 8 layers, 8 micro-batches, fp32: 5 layers with the embedding, 3 with the head.

    Gathers of stage 0: 5·6 + 1; of stage 1: 3·6 + 1 and the statistics 2·16·4 = 128; scatters 5·4 +
    1 and 3·4 + 1. A rank's half of the stream, 1024 bytes, goes up and its gradient down. Norms: 10
    of 32 elements, and 7 with the final one; all-reduces of halves, twice: 32·4 bytes each.
    The step's sum: 3·8 + 51 parameters + 6 requests = 81 fp64 over 4 ranks: 2·3·21·8 = 1008.
    """
    run = pipeline("1f1b", stage_layers=[5, 3])
    ups, downs = "pipeline 0>1", "pipeline 1>0"
    message = Count(8, 8 * 1024)
    stages = (
        {
            ("tensor", "all_gather"): Count(8 * 31, 8 * 31 * 1024),
            ("tensor", "reduce_scatter"): Count(8 * 21, 8 * 21 * 1024),
            ("tensor", "all_reduce"): Count(1, 10 * 128),
            ("world", "all_reduce"): Count(1, 1008),
            (ups, "send"): message,
            (downs, "receive"): Count(8, 0),
        },
        {
            ("tensor", "all_gather"): Count(8 * (19 + 1), 8 * (19 * 1024 + 128)),
            ("tensor", "reduce_scatter"): Count(8 * 13, 8 * 13 * 1024),
            ("tensor", "all_reduce"): Count(1, 7 * 128),
            ("world", "all_reduce"): Count(1, 1008),
            (ups, "receive"): Count(8, 0),
            (downs, "send"): message,
        },
    )
    for place in places(run, tensor=2, pipeline=2):
        assert step_traffic(run, place, "cpu").counts == stages[place.along("pipeline")]


def test_a_step_of_two_stages_with_split_backwards():
    """As above, with 2 + 2 + 4 gathers of a layer where a backward is split, and 2 + 4 where the
    first stage joins it, whose gradient goes to no other rank; the embedding has 1 either way."""
    run = pipeline("zb-h1", stage_layers=[5, 3])
    grid = Grid(tensor=2, pipeline=2)
    kinds = [Counter(p.kind for p in passes(a)) for a in run_schedule(run, grid).actions]
    assert kinds[1] == {"F": 8, "B": 8, "W": 8}
    assert kinds[0]["BW"] + kinds[0]["W"] == 8
    gathers = (5 * (8 * 8 - 2 * kinds[0]["BW"]) + 8, 8 * (3 * 8 + 1))
    statistics = Count(8, 8 * 128)
    for stage, scatters in enumerate((21, 13)):
        counts = pass_traffic(run, Place(grid, 2 * stage), "cpu").counts
        calls, sent = (stage * n for n in statistics)
        assert counts[GATHER] == Count(gathers[stage] + calls, gathers[stage] * 1024 + sent)
        assert counts[SCATTER] == Count(8 * scatters, 8 * scatters * 1024)


@pytest.mark.parametrize("schedule", NAMES)
@pytest.mark.parametrize("policy", ["linear_outputs", "layer_input"])
def test_stages_together_send_what_one_sends(schedule, policy):
    """A pipeline moves no collective of a pass but for what split backwards gather again."""
    run = config(
        model={"layers": 8},
        train={"saved_activations": policy},
        parallel={"tensor": 2, "pipeline": 4, "schedule": schedule},
    )
    grid = Grid(tensor=2, pipeline=4)
    total = sum((pass_traffic(run, Place(grid, 2 * r), "cpu") for r in range(4)), NOTHING).counts
    alone = run.model_copy(update={"parallel": Parallel(tensor=2)})
    whole = dict(pass_traffic(alone, Place(Grid(tensor=2), 0), "cpu").counts)
    layers = {chunk.index: len(chunk.layers) for chunk in chunks_of(run, grid)}
    passed = [one for actions in run_schedule(run, grid).actions for one in passes(actions)]
    # W gathers dz and dx2 again, and n2 where B needed it to have gate and up.
    again = 2 if policy == "linear_outputs" else 3
    extra = again * sum(layers[one.chunk] for one in passed if one.kind == "W")
    assert bool(extra) == schedule.startswith("zb")
    whole["tensor", "all_gather"] = Count(
        whole["tensor", "all_gather"].calls + extra,
        whole["tensor", "all_gather"].bytes + extra * 1024,
    )
    assert {key: count for key, count in total.items() if key[0] == "tensor"} == whole


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("schedule", NAMES)
def test_every_boundary_between_ranks_is_crossed_once_each_way(schedule, sequence_parallel):
    """By 8 micro-batches, with 2048 bytes over the tensor ranks, or as much from each of them."""
    run = pipeline(schedule, sequence_parallel=sequence_parallel)
    grid = Grid(tensor=2, pipeline=2)
    owners = owners_of(run, grid)
    crossings = Counter((a, b) for a, b in pairwise(owners) if a != b)
    crossings.update({(b, a): n for (a, b), n in Counter(crossings).items()})
    found = [pass_traffic(run, place, "cpu").counts for place in places(run, tensor=2, pipeline=2)]
    size = 1024 if sequence_parallel else 2048
    for (source, destination), times in crossings.items():
        group = f"pipeline {source}>{destination}"
        for rank, counts in enumerate(found):
            sent = Count(8 * times, 8 * times * size) if rank // 2 == source else None
            assert counts.get((group, "send")) == sent
            received = Count(8 * times, 0) if rank // 2 == destination else None
            assert counts.get((group, "receive")) == received
    assert sum(key[1] == "send" for key in found[0]) == len([c for c in crossings if c[0] == 0])


def test_a_tied_embedding_is_summed_between_the_two_that_have_it():
    """64 x 32 over two tensor and two data ranks: 512 elements of a rank, fp32: 2 · 256 · 4.

    The copy's bucket travels between data ranks as an output projection's would, and is gathered.
    """
    run = config(
        model={"layers": 4, "tie_embeddings": True},
        parallel={"tensor": 2, "data": 2, "pipeline": 4},
    )
    untied = run.model_copy(
        update={"model": run.model.model_copy(update=dict(tie_embeddings=False))}
    )
    for place in places(run, tensor=2, data=2, pipeline=4):
        counts, others = (dict(step_traffic(c, place, "cpu").counts) for c in (run, untied))
        both_ends = place.along("pipeline") in (0, 3)
        assert counts.pop(("tied", "all_reduce"), None) == (Count(1, 2048) if both_ends else None)
        world = ("world", "all_reduce")  # of the whole model, which has one parameter fewer
        assert counts.pop(world).bytes == 2 * 15 * -(-(3 * 8 + 26 + 3) // 16) * 8
        assert others.pop(world).bytes == 2 * 15 * -(-(3 * 8 + 27 + 3) // 16) * 8
        assert counts == others


def test_a_tied_embedding_on_one_rank_travels_once():
    run = config(
        model={"layers": 4, "tie_embeddings": True},
        parallel={"tensor": 2, "data": 2, "pipeline": 2, "schedule": "zb-v"},
    )
    for place in places(run, tensor=2, data=2, pipeline=2):
        assert not any(group == "tied" for group, _ in step_traffic(run, place, "cpu").counts)


def test_an_early_step_counts_the_tokens_first_and_gathers_again_when_undone():
    """The tokens: one fp64 among 2 data ranks, 2·1·1·8 bytes."""
    plain, early = (
        config(parallel={"data": 2, "pipeline": 2, "early_step": on}) for on in (False, True)
    )
    gather = ("data", "all_gather_rows")
    for place in places(plain, data=2, pipeline=2):
        before, after = (dict(step_traffic(c, place, "cpu").counts) for c in (plain, early))
        assert after.pop(("data", "all_reduce")) == Count(1, 16)
        assert after == before
        # An update that is taken back: the old weights, or clipped ones, go round once more.
        counts = step_traffic(early, place, "cpu", updates=2).counts
        assert counts[gather] == Count(*(2 * n for n in before[gather]))
    alone = config(parallel={"early_step": True})
    assert step_traffic(alone, *places(alone), "cpu") == NOTHING
