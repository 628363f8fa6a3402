"""What each rank of a real step holds at most is what the ledger says, within 3%."""

from __future__ import annotations

import pytest

from megallama.spec.groups import run_schedule
from megallama.spec.memory import rank_bytes
from tests.layouts.case import LR, Case
from tests.layouts.pool import Pool, Seat, Task
from tests.layouts.problem import batch, problem_of, share_of
from tests.layouts.walks import build
from tests.memory import counted

#: Tensors of 128 KiB and more: an allocation that the ledger leaves out shows.
SHAPE = (
    "d_model=128 ffn=352 heads=4 kv_heads=4 layers=4 sequence=128 micro_batch=2 vocab=512 "
    "precision=fp32"
)
CASES = (
    "tensor=1 data=1 overlap=none",
    "tensor=2 data=1",
    "tensor=2 data=1 sequence_parallel=False kv_heads=2",
    "tensor=2 data=1 overlap=full policy=no_gate_up",
    "tensor=4 data=1 policy=layer_input",
    "tensor=1 data=2",
    "tensor=1 data=2 wire=bf16 micro_batches=2",
    "tensor=1 data=2 early=True micro_batches=2 tied=True",
    "tensor=1 data=1 pipeline=2 micro_batches=4",
    "tensor=1 data=1 pipeline=2 micro_batches=4 schedule=zb-h1",
    "tensor=1 data=1 pipeline=2 micro_batches=2 schedule=zb-h1 tied=True vocab=4096",
    "tensor=2 data=1 pipeline=2 micro_batches=2 schedule=zb-h1",
    "tensor=1 data=1 pipeline=2 micro_batches=3 schedule=gpipe policy=layer_input",
    "tensor=2 data=1 pipeline=2 micro_batches=4 schedule=zb-v",
    "tensor=1 data=2 pipeline=2 micro_batches=4 schedule=interleaved virtual=2",
)


def peak(seat: Seat, case: Case) -> tuple[int, dict[str, int]]:
    """On one rank: the most bytes that there are during the second step, and the ledger."""
    with counted() as counter:
        trainer = build(seat, case)
        try:
            share = share_of(batch(problem_of(case), 0), trainer.place.along("data"), case.data)
            trainer.step.run(share, LR)
            counter.reset()
            trainer.step.run(share, LR)
        finally:
            trainer.groups.close()
    place = trainer.place
    actions = run_schedule(trainer.config, place.grid).actions[place.along("pipeline")]
    return counter.peak, rank_bytes(trainer.config, place, actions)


@pytest.mark.parametrize("text", CASES)
def test_a_step_holds_what_the_ledger_says(pool: Pool, text: str) -> None:
    case = Case.parse(f"{SHAPE} {text}")
    outcome = pool.run(Task(case.ranks, peak, (case,)))
    assert outcome.error is None, outcome.error
    assert len(outcome.results) == case.ranks
    for rank, (counted_bytes, sizes) in enumerate(outcome.results):
        difference = sum(sizes.values()) / counted_bytes - 1
        assert abs(difference) < 0.03, (rank, counted_bytes, sizes)


def test_a_fused_schedule_holds_no_more_than_the_ledger_says(pool: Pool) -> None:
    """Two passes drift by a layer or so; the ledger takes the more of it."""
    text = f"{SHAPE} pipeline=2 micro_batches=4 schedule=1f1b-fused"
    outcome = pool.run(Task(2, peak, (Case.parse(text),)))
    assert outcome.error is None, outcome.error
    for counted_bytes, sizes in outcome.results:
        assert 0.99 < sum(sizes.values()) / counted_bytes < 1.05
