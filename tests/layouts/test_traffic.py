"""What a real step sends is what `spec.traffic` says: every operation, its calls and its bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from megallama.autograd.passes import WgradQueue, drive
from megallama.autograd.stash import Stash
from megallama.spec.logits import CHUNK_BYTES
from megallama.spec.replicas import comparison_traffic
from megallama.spec.traffic import (
    REQUESTS,
    Count,
    Traffic,
    initial_traffic,
    layer_backward,
    layer_forward,
    step_traffic,
    stream_of,
)
from megallama.train.build import Trainer
from megallama.train.passes import Samples
from megallama.train.replicas import Replicas
from tests.layouts.case import LR, POLICIES, Case
from tests.layouts.pool import Pool, Seat, Task
from tests.layouts.problem import batch, problem_of, share_of
from tests.layouts.walks import build

Counts = dict[tuple[str, str], Count]
Parts = list[tuple[str, Counts, Counts]]  # a name, what was counted, what the formulas say

#: The layout, then one thing or two that change what is sent.
CASES = (
    "tensor=1 data=1",
    "tensor=2 data=1",
    "tensor=2 data=1 overlap=none policy=layer_input micro_batches=3",
    "tensor=2 data=1 overlap=full policy=no_gate_up labels=all",
    "tensor=2 data=1 sequence_parallel=False",
    "tensor=2 data=1 sequence_parallel=False overlap=full policy=layer_input micro_batches=2",
    "tensor=4 data=1 kv_heads=2 vocab=61 precision=fp32",
    "tensor=4 data=1 kv_heads=1 overlap=full policy=layer_input precision=bf16",
    "tensor=4 data=1 sequence_parallel=False kv_heads=2 overlap=none vocab=13",
    "tensor=1 data=2 micro_batches=2 labels=unequal",
    "tensor=1 data=2 wire=bf16 precision=bf16 tied=True",
    "tensor=1 data=4 heads=3 kv_heads=3 d_model=18 ffn=13 vocab=19",
    "tensor=1 data=4 wire=bf16 precision=fp32 labels=empty_step overlap=none",
    "tensor=2 data=2 labels=empty_step micro_batches=2 policy=all",
    "tensor=2 data=2 overlap=full policy=layer_input micro_batches=3 micro_batch=2 precision=bf16",
    "tensor=2 data=2 sequence_parallel=False kv_heads=1 wire=bf16 precision=fp32",
    "tensor=2 data=4 kv_heads=1 heads=2 d_model=20 vocab=61 tied=True",
    "tensor=4 data=2 kv_heads=1 overlap=full vocab=9 precision=bf16 wire=bf16 micro_batch=2",
    "tensor=4 data=2 kv_heads=2 sequence_parallel=False overlap=full policy=no_attention_output",
    "tensor=8 data=1 kv_heads=2 vocab=5 layers=1 overlap=full policy=no_gate_up",
    "tensor=1 data=1 pipeline=2 schedule=gpipe micro_batches=3",
    "tensor=1 data=2 pipeline=4 tied=True layers=7 stage_layers=1,3,2,1 micro_batches=5",
    "tensor=2 data=1 pipeline=4 schedule=zb-h1 layers=5 policy=layer_input micro_batches=6",
    "tensor=2 data=2 pipeline=2 schedule=zb-h2 policy=no_gate_up overlap=full micro_batches=4",
    "tensor=4 data=1 pipeline=2 schedule=zb-v layers=5 kv_heads=2 sequence_parallel=False",
    "tensor=1 data=1 pipeline=8 schedule=zb-v layers=16 micro_batches=3 precision=bf16 tied=True",
    "tensor=2 data=2 pipeline=2 schedule=1f1b-fused tied=True precision=bf16 micro_batches=5",
    "tensor=2 data=1 pipeline=2 schedule=interleaved virtual=3 layers=8 stage_layers=1,2,1,1,2,1",
    "tensor=2 data=1 pipeline=4 schedule=interleaved-fused virtual=2 layers=9 overlap=none",
    "tensor=1 data=2 early=True labels=empty_step",
)
EARLY = (
    "tensor=2 data=2 pipeline=2 schedule=zb-h1 early=True tied=True kv_heads=1 wire=bf16 "
    "precision=bf16 micro_batches=3",
    "tensor=1 data=2 pipeline=3 schedule=zb-h2 early=True layers=4 micro_batches=4",
)


def take(trainer: Trainer) -> Counts:
    """What was sent since this was called last."""
    counts = trainer.groups.traffic.counts
    taken = {key: Count(count.calls, count.bytes) for key, count in counts.items()}
    counts.clear()
    return taken


@contextmanager
def logits_held(case: Case, tokens: int | None) -> Iterator[None]:
    """Hold the logits of so many tokens at a time, or of as many as there are."""
    held, rows = CHUNK_BYTES["cpu"], -(-case.vocab // case.tensor)
    itemsize = {"bf16": 2, "fp32": 4, "fp64": 8}[case.precision]
    try:
        if tokens is not None:
            CHUNK_BYTES["cpu"] = tokens * rows * itemsize
        yield
    finally:
        CHUNK_BYTES["cpu"] = held


def steps(seat: Seat, case: Case, tokens: int | None, grad_clip: float) -> Parts:
    """On one rank: the build, a step as the loop takes it, one with layer norms, and a comparison
    of replicas."""
    trainer = build(seat, case, grad_clip)
    try:
        config, place, problem = trainer.config, trainer.place, problem_of(case)
        found = [("build", take(trainer), dict(initial_traffic(config, place).counts))]
        with logits_held(case, tokens):
            for number, layer_norms in enumerate((False, True)):
                share = share_of(batch(problem, number), place.along("data"), case.data)
                result = trainer.step.run(share, LR, layer_norms, lambda: (False,) * REQUESTS)
                kept = result.applied and result.grad_norm <= grad_clip
                updates = (1 if kept else 2) if case.early else int(result.applied)
                said = step_traffic(config, place, "cpu", layer_norms=layer_norms, updates=updates)
                found.append((f"step {number + 1}", take(trainer), dict(said.counts)))
        Replicas(trainer).compare()
        said = comparison_traffic(config, place)
        found.append(("comparison", take(trainer), dict(said.counts)))
        return found
    finally:
        trainer.groups.close()


def passes(seat: Seat, case: Case) -> list[Counts]:
    """On one rank: what one micro-batch's forward sends, and its backward."""
    trainer = build(seat, case)
    try:
        share = share_of(batch(problem_of(case), 0), trainer.place.along("data"), case.data)
        micro_batch = Samples(trainer.model, share, case.micro_batch).micro_batch(0)
        stash, queue, found = Stash(), WgradQueue(), []
        trainer.zero.expect(1)
        take(trainer)
        drive(trainer.model.chunks[0].forward(micro_batch, None, stash))
        found.append(take(trainer))
        drive(trainer.model.chunks[0].backward(micro_batch, None, stash, queue), queue)
        return [*found, take(trainer)]
    finally:
        trainer.groups.close()


def check_steps(
    pool: Pool, case: Case, tokens: int | None = None, grad_clip: float = 1.0
) -> list[Parts]:
    outcome = pool.run(Task(case.ranks, steps, (case, tokens, grad_clip)))
    assert outcome.error is None, outcome.error
    for rank, parts in enumerate(outcome.results):
        for name, counted, said in parts:
            assert counted == said, f"rank {rank}, {name}"
    return outcome.results


@pytest.mark.parametrize("text", CASES)
def test_a_step_sends_what_the_formulas_say(pool, text):
    case = Case.parse(text)
    results = check_steps(pool, case)
    assert len(results) == case.ranks
    if case.ranks > 1:
        assert all(counted for parts in results for name, counted, _ in parts if "step" in name)
    if case.labels == "empty_step" and not case.early:  # step 2 is left out: no weight travels
        assert ("data", "all_gather_rows") in results[0][1][1]
        assert ("data", "all_gather_rows") not in results[0][2][1]


@pytest.mark.parametrize("grad_clip, gathers", [(1e9, 1), (1e-6, 2)])
@pytest.mark.parametrize("text", EARLY)
def test_an_update_that_is_taken_back_gathers_the_weights_twice(pool, text, grad_clip, gathers):
    case = Case.parse(text)
    for rank, (start, step, *_) in enumerate(check_steps(pool, case, grad_clip=grad_clip)):
        once = start[1]["data", "all_gather_rows"].calls
        assert step[1]["data", "all_gather_rows"].calls == gathers * once, rank


@pytest.mark.parametrize("held, chunks", [(16, 1), (7, 3), (1, 16)])
@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_the_loss_has_a_gather_for_every_chunk_of_logits(pool, held, chunks, sequence_parallel):
    """Of 16 tokens; 6 gathers of a layer, one of the head, one of the embedding."""
    case = Case(tensor=2, vocab=61, layers=1, sequence_parallel=sequence_parallel, precision="fp32")
    ((_, (_, step, _), *_), _) = check_steps(pool, case, held)
    others = 6 + 2 if sequence_parallel else 0
    assert step["tensor", "all_gather"].calls == others + chunks


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("overlap", ["none", "backward", "full"])
def test_a_layer_more_sends_a_layer_more(pool, overlap, sequence_parallel, policy):
    """Three layers less two are one: its forward and its backward, each by itself."""
    case = Case(
        tensor=2,
        sequence_parallel=sequence_parallel,
        overlap=overlap,
        policy=policy,
        precision="bf16",
    )
    stream = stream_of(case.config(1.0))
    layer = [layer_forward(stream), layer_backward(stream, policy)]
    tasks = [Task(2, passes, (replace(case, layers=layers),)) for layers in (2, 3)]
    outcomes = dict(pool.run_all(tasks))
    assert [outcomes[n].error for n in (0, 1)] == [None, None]
    for fewer, more in zip(outcomes[0].results, outcomes[1].results, strict=True):
        found = [
            dict((Traffic(counts) + one).counts) for counts, one in zip(fewer, layer, strict=True)
        ]
        assert found == more
    # DESIGN §4, for 16 tokens of width 32 in bf16 on two ranks: 512 bytes a gather or a scatter.
    again, pieces = int(policy == "layer_input"), 2 if overlap == "full" else 1
    if sequence_parallel:
        gathers, scatters = 4 + again, 2 + again
        backward = {
            ("tensor", "all_gather"): Count(pieces * gathers, 512 * gathers),
            ("tensor", "reduce_scatter"): Count(pieces * scatters, 512 * scatters),
        }
    else:
        backward = {("tensor", "all_reduce"): Count(2 + again * pieces, 1024 * (2 + again))}
    assert layer[1].counts == backward
