"""The table's own parts: cases as text, the covering, the reference's optimizer, the comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import combinations, product
from math import prod

import numpy as np
import pytest
import torch

from tests.layouts.case import SCHEDULES, Case
from tests.layouts.compare import Piece, RankStep, compare, same_as_alone
from tests.layouts.covering import (
    ALL_BITWISE,
    BITWISE,
    CORNERS,
    Table,
    default_table,
    full_table,
)
from tests.layouts.fuzz import draw
from tests.layouts.problem import batch, problem_of, share_of, solve
from tests.reference import IGNORED, plain


@cache
def made(make: Callable[[], Table]) -> Table:
    """A table, which takes a second: of each one for all tests, and none where others run."""
    return make()


@pytest.mark.parametrize("make", [default_table, full_table], ids=["default", "all"])
def test_a_table_covers_what_it_says(make):
    table = made(make)
    assert table.pairs[0] == table.pairs[1]
    assert [case.faults() for case in table.cases if case.faults()] == []
    assert set(CORNERS) < set(table.cases)
    # Counted anew, from the cases.
    cases = table.cases[: table.cases.index(CORNERS[0])]
    layouts = {(c.tensor, c.data, c.pipeline) for c in cases}
    powers = (1, 2, 4, 8)
    assert layouts == {grid for grid in product(powers, repeat=3) if prod(grid) <= 8}
    axes = {
        "layouts": ("tensor", "data", "pipeline"),
        "layout × schedule × overlap": ("tensor", "data", "pipeline", "schedule", "overlap"),
        "tensor × data × overlap × policy": ("tensor", "data", "overlap", "policy"),
    }
    for name, (covered, _) in table.combined.items():
        assert len({tuple(getattr(c, field) for field in axes[name]) for c in cases}) == covered
    fields = ("overlap", "policy", "kv_heads", "labels", "precision", "tied", "vocab", "schedule")
    for one, other in combinations((*fields, "early", "micro_batches"), 2):
        pairs = {(getattr(c, one), getattr(c, other)) for c in cases}
        sizes = {field: len({getattr(c, field) for c in cases}) for field in (one, other)}
        assert len(pairs) == sizes[one] * sizes[other], (one, other)


def test_the_full_table_covers_every_layout_with_every_schedule_and_overlap():
    combined = made(full_table).combined
    assert all(covered == wanted for covered, wanted in combined.values())
    pipelines, one_stage = 10, 10  # the ways to write 2, 4 and 8 with and 1 to 8 without stages
    assert combined["layout × schedule × overlap"][1] == 3 * (8 * pipelines + one_stage)


@pytest.mark.parametrize("cases, stages", [(BITWISE, (2,)), (ALL_BITWISE, (2, 4, 8))])
def test_every_schedule_is_run_for_its_bits(cases, stages):
    assert all(case.faults() == [] and case.twin for case in cases)
    run = {(case.schedule, case.pipeline) for case in cases}
    assert run >= set(product(SCHEDULES, stages))
    assert {case.overlap for case in cases} == {"none", "backward"}
    assert {case.precision for case in cases} == {"fp64", "fp32"}
    assert {case.tied for case in cases} == {case.early for case in cases} == {True, False}


def test_a_twin_is_the_same_problem_in_one_process():
    case = BITWISE[0]
    assert case.twin.ranks == 1
    assert problem_of(case.twin) == problem_of(case)
    assert case.twin.share == case.share
    assert case.twin.twin is None
    assert replace(case, data=2).twin is None


def test_tables_and_fuzz_are_the_same_every_time():
    for make in (default_table, full_table):
        assert make() == made(make)
    cases = [draw(1, number) for number in range(60)]
    assert cases == [draw(1, number) for number in range(60)]
    assert len(set(cases)) == 60
    for case in cases:
        assert case.faults() == []
        assert Case.parse(str(case)) == case
        case.config(1.0)
    assert {case.schedule for case in cases if case.pipeline > 1} == set(SCHEDULES)
    assert {case.pipeline for case in cases} >= {1, 2, 3, 4, 8}
    assert {case.virtual for case in cases} == {1, 2, 3}


@pytest.mark.parametrize("text", ["tensors=2", "tied=yes", "tensor=two", "early=1"])
def test_a_case_is_not_guessed(text):
    with pytest.raises(ValueError):
        Case.parse(text)


CASE = Case(data=2, labels="empty_rank", micro_batches=2, masked=True)


def test_batches_are_what_their_kind_says():
    whole = batch(problem_of(CASE), 0)
    first, last = (share_of(whole, rank, 2) for rank in range(2))
    assert (first.labels_NS != IGNORED).any()
    assert (last.labels_NS == IGNORED).all()
    assert [sum(lengths) for lengths in whole.document_lengths] == [CASE.sequence] * 4
    empty = problem_of(replace(CASE, labels="empty_step"))
    assert [(batch(empty, n).labels_NS != IGNORED).any() for n in range(3)] == [True, False, True]


@pytest.mark.parametrize("labels", ["some", "empty_step"])
def test_the_reference_is_torch_s_optimizer_on_autograd(labels):
    problem = problem_of(replace(CASE, labels=labels))
    reference = solve(problem)
    weights = {name: w.clone().requires_grad_() for name, w in reference.initial.items()}
    decay = {False: [w for w in weights.values() if w.dim() == 1]}
    decay[True] = [w for w in weights.values() if w.dim() == 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay[True], "weight_decay": 0.1}, {"params": decay[False]}],
        lr=1e-3,
        betas=(0.9, 0.95),
        eps=1e-5,
        weight_decay=0.0,
    )
    clipped = []
    for number, step in enumerate(reference.steps):
        whole = batch(problem, number)
        labels_BS = torch.from_numpy(whole.labels_NS)
        if (labels_BS != IGNORED).any():
            tokens = torch.from_numpy(whole.tokens_NS)
            logits = plain.forward(problem.shape, weights, tokens, whole.document_lengths)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels_BS.flatten())
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(weights.values(), reference.grad_clip)
            optimizer.step()
            assert step.numbers["loss"] == pytest.approx(loss.item(), rel=1e-13)
            assert step.numbers["gradient norm"] == pytest.approx(norm.item(), rel=1e-13)
            clipped.append(norm.item() > reference.grad_clip)
        for name, weight in weights.items():
            torch.testing.assert_close(step.weights[name], weight.detach(), rtol=0, atol=1e-14)
    assert set(clipped) == {True, False}


def perfect(case: Case, ranks: int = 2) -> list[list[RankStep]]:
    """Ranks that split every tensor by rows, and hold exactly the reference."""

    def pieces(tensors, rank):
        for name, tensor in tensors.items():
            each = len(tensor) // ranks
            start = (rank * each, *(0 for _ in tensor.shape[1:]))
            yield Piece(name, start, tensor[rank * each : (rank + 1) * each].numpy().copy())

    return [
        [
            RankStep(
                dict(step.numbers),
                step.valid_tokens > 0,
                list(pieces(step.gradients, rank)),
                list(pieces(step.weights, rank)),
            )
            for step in solve(problem_of(case)).steps
        ]
        for rank in range(ranks)
    ]


def damage(runs: list[list[RankStep]], how: str) -> None:
    """One thing wrong in the second step."""
    step = runs[1][1]
    if how == "loss":
        step.numbers["loss"] += 1e-9
    elif how == "not applied":
        runs[0][1], runs[1][1] = (replace(run[1], applied=False) for run in runs)
    elif how == "gradient":
        step.gradients[3].value[0] *= 1 + 1e-9
    elif how == "nan":
        step.gradients[3].value[0] = np.nan
    elif how == "weight":
        step.weights[3].value[0, 0] += 1e-9
    elif how == "missing":
        del step.weights[3]
    elif how == "replica":
        piece = runs[0][1].weights[3]
        step.weights.append(replace(piece, value=piece.value + np.spacing(piece.value)))


@pytest.mark.parametrize(
    "how, fault",
    [
        ("loss", "step 2: rank 1 reports other numbers"),
        ("not applied", "step 2: the step was not applied"),
        ("gradient", "step 2 gradient layers.0.attention.wk.weight: relative error"),
        ("nan", "step 2 gradient layers.0.attention.wk.weight: relative error nan"),
        ("weight", "step 2 weight layers.0.attention.wk.weight: relative error"),
        ("missing", "step 2 weight layers.0.attention.wk.weight: 512 of 1024 elements"),
        ("replica", "step 2 weight layers.0.attention.wk.weight: rank 1 holds other bits"),
    ],
)
def test_the_comparison_finds_a_difference(how, fault):
    reference, runs = solve(problem_of(CASE)), perfect(CASE)
    assert compare(CASE, reference, runs) == []
    damage(runs, how)
    assert any(line.startswith(fault) for line in compare(CASE, reference, runs))


@pytest.mark.parametrize(
    "how, fault",
    [
        ("loss", "rank 1 step 2: other numbers than in one process"),
        ("not applied", "rank 0 step 2: other numbers than in one process"),
        ("gradient", "rank 1 step 2: gradients layers.0.attention.wk.weight: other bits"),
        ("weight", "rank 1 step 2: weights layers.0.attention.wk.weight: other bits"),
        ("missing", "step 2 weights layers.0.attention.wk.weight: 512 of 1024 elements"),
        ("replica", "rank 1 step 2: weights layers.0.attention.wk.weight: other bits"),
    ],
)
def test_the_comparison_with_one_process_finds_a_bit(how, fault):
    alone, runs = perfect(CASE, 1)[0], perfect(CASE)
    assert list(same_as_alone(runs, alone)) == []
    damage(runs, how)
    assert any(line.startswith(fault) for line in same_as_alone(runs, alone))


@pytest.mark.parametrize("ours, found", [(-3e-18, False), (1e-12, True), (np.nan, True)])
def test_rounding_noise_in_place_of_zero_must_be_matched_by_noise(ours, found):
    """A gradient that is zero but for rounding has no digits to compare: it must be as small."""
    reference, runs = solve(problem_of(CASE)), perfect(CASE)
    name = "layers.0.attention.wk.weight"
    steps = list(reference.steps)
    noise = torch.full_like(steps[1].gradients[name], 1e-18)
    steps[1] = replace(steps[1], gradients=steps[1].gradients | {name: noise})
    for piece in (p for run in runs for p in run[1].gradients if p.name == name):
        piece.value[...] = ours
    faults = compare(CASE, replace(reference, steps=steps), runs)
    assert [f"step 2 gradient {name}" in fault for fault in faults] == [True] * found


def test_a_zero_gradient_must_be_zero_and_a_wrong_update_cannot_hide():
    case = replace(CASE, labels="empty_step", precision="fp32")
    reference, runs = solve(problem_of(case)), perfect(case)
    assert compare(case, reference, runs) == []
    runs[1][1].weights[3].value[0, 0] += 1e-9  # far below the weight's tolerance
    assert any("step 2 update" in line for line in compare(case, reference, runs))
    runs = perfect(CASE)
    for run in runs:
        for piece in run[0].weights:
            value, before = piece.value, reference.initial[piece.name].numpy()[piece.region]
            value += 1.5e-3 * (value - before)
    fp32 = replace(CASE, precision="fp32")
    faults = compare(fp32, solve(problem_of(fp32)), runs)
    assert any(line.startswith("step 1 update") for line in faults)
    assert not any(" weight " in line for line in faults)
