"""An update before the norm is known: the same bits as after it, also where it is taken back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from megallama.train.build import Trainer
from tests.layouts.body import load
from tests.layouts.case import LR, STEPS, Case
from tests.layouts.compare import identical
from tests.layouts.pool import Seat, Task
from tests.layouts.problem import batch, initial_weights, problem_of, share_of, solve
from tests.layouts.runs import run_each
from tests.layouts.walks import build

CLIPPED = [
    Case.parse(text)
    for text in (
        "tensor=1 data=1 pipeline=4 schedule=zb-h1 micro_batches=5 tied=True layers=5",
        "tensor=1 data=2 pipeline=2 schedule=zb-v micro_batches=3 layers=5 labels=empty_step",
        "tensor=2 data=2 pipeline=2 kv_heads=1 schedule=zb-h2 tied=True precision=fp32",
        "tensor=2 data=1 pipeline=2 schedule=1f1b-fused micro_batches=4 layers=3 overlap=full",
        "tensor=1 data=2 micro_batches=2 precision=fp32",
    )
]


@pytest.mark.parametrize("case", CLIPPED, ids=str)
def test_an_early_update_changes_no_bit(pool, case):
    late, early = run_each(pool, [replace(case, early=early) for early in (False, True)])
    assert list(identical(late, early)) == []


@dataclass(frozen=True)
class Step:
    """A step of one rank: what became of it, and digests of its masters and moments and of its
    weights after it."""

    fault: str | None
    taken_back: int
    updates: int
    state: bytes
    weights: bytes


def steps(seat: Seat, case: Case, grad_clip: float, poisons: Sequence[float]) -> list[Step]:
    """A step for each of `poisons`, which is added to a gradient of the last stage; 0 is not."""
    trainer = build(seat, case, grad_clip)
    try:
        problem, back = problem_of(case), []
        load(trainer, initial_weights(problem.shape, problem.seed))
        if trainer.step.early is not None:
            take_back = trainer.step.early.take_back
            trainer.step.early.take_back = lambda: (back.append(1), take_back())
        found = []
        for number, poison in enumerate(poisons):
            if poison:
                _poison(trainer, f"layers.{case.layers - 1}.w2", poison)
            share = share_of(batch(problem, number), trainer.place.along("data"), case.data)
            fault = trainer.step.run(share, LR).fault
            found.append(_step(trainer, fault, len(back)))
            back.clear()
        return found
    finally:
        trainer.groups.close()


def _poison(trainer: Trainer, name: str, value: float) -> None:
    """Once, on the last data rank that has the parameter, as soon as its gradient is whole."""
    zero, place = trainer.zero, trainer.place
    gradient = zero.state.own_gradients.get(name)
    if gradient is None or place.along("data") + 1 < place.grid.data:
        return
    finish = zero.finish_gradients

    def poisoned() -> None:
        finish()
        gradient[0, 0] += value
        zero.finish_gradients = finish

    zero.finish_gradients = poisoned


def _step(trainer: Trainer, fault: str | None, taken_back: int) -> Step:
    optimizer, state = trainer.optimizer, trainer.model.state
    kinds = state.masters, optimizer.exp_avg, optimizer.exp_avg_sq
    held = [tensor for kind in kinds for tensor in kind.values()]
    weights = [state.weight(shard.name).wait() for shard in state.table]
    return Step(fault, taken_back, optimizer.updates, *map(_digest, (held, weights)))


def _digest(tensors: Iterable[Tensor]) -> bytes:
    parts = [tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors]
    return hashlib.blake2b(b"".join(parts)).digest()


def run(pool, case: Case, grad_clip: float, poisons: Sequence[float]) -> list[list[Step]]:
    outcome = pool.run(Task(case.ranks, steps, (case, grad_clip, poisons)))
    assert outcome.error is None, outcome.error
    return outcome.results


POISONED = [
    Case.parse(text)
    for text in (
        "tensor=1 data=1 pipeline=4 schedule=zb-h1 early=True micro_batches=5 tied=True layers=5",
        "tensor=1 data=2 pipeline=2 schedule=zb-v early=True micro_batches=3 layers=5",
        "tensor=2 data=2 pipeline=2 early=True micro_batches=2 precision=bf16 tied=True",
    )
]


@pytest.mark.parametrize("case", POISONED, ids=str)
def test_a_gradient_that_is_not_finite_is_taken_back_on_every_stage(pool, case):
    """To the bits from before the step, weights that were gathered again included."""
    poisons = (0.0, math.nan, math.inf, -math.inf, 0.0)
    ranks = run(pool, case, 1e9, poisons)
    plain = run(pool, replace(case, early=False), 1e9, poisons)
    for before, *poisoned, after in ranks:
        wanted = f"the gradient of layers.{case.layers - 1}.w2 is not finite"
        assert [s.fault for s in (before, *poisoned, after)] == [None, *[wanted] * 3, None]
        assert [s.taken_back for s in (before, *poisoned, after)] == [0, 1, 1, 1, 0]
        assert [s.updates for s in (before, *poisoned, after)] == [1, 1, 1, 1, 2]
        for step in poisoned:
            assert (step.state, step.weights) == (before.state, before.weights)
        assert after.state != before.state
    assert [[replace(s, taken_back=0) for s in rank] for rank in ranks] == plain


def test_an_update_that_is_clipped_is_taken_back_and_others_are_kept(pool):
    case = POISONED[0]
    reference = solve(problem_of(case))
    clipped = [s.numbers["gradient norm"] > reference.grad_clip for s in reference.steps]
    assert {True, False} <= set(clipped[:2])
    for rank in run(pool, case, reference.grad_clip, (0.0,) * STEPS):
        assert [step.taken_back for step in rank] == [int(cut) for cut in clipped]
        assert [step.updates for step in rank] == [1, 2, 3]
