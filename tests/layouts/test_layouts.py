"""The equivalence table's covering set: every layout gives the numbers of one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from torch import Tensor

from tests.layouts.case import Case
from tests.layouts.compare import (
    Faults,
    Piece,
    RankStep,
    assemble,
    compare,
    identical,
    same_as_alone,
)
from tests.layouts.covering import default_table
from tests.layouts.planted import PLANTED
from tests.layouts.pool import Pool
from tests.layouts.problem import problem_of, solve
from tests.layouts.rounding import steady
from tests.layouts.runs import Report, run_cases, run_each

CASES = default_table().cases


@pytest.fixture(scope="module")
def reports(pool: Pool) -> dict[Case, Report]:
    """All cases, run side by side."""
    asked = {steady(case): case for case in CASES}
    return {asked[report.case]: report for report in run_cases(pool, asked)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layout_is_the_reference(reports, case):
    report = reports[case]
    assert not report.faults, str(report)


@pytest.fixture(scope="module")
def clean(pool: Pool) -> dict[Case, Report]:
    """The cases of planted faults without them."""
    cases = dict.fromkeys(Case.parse(fault.case) for fault in PLANTED.values())
    return {report.case: report for report in run_cases(pool, cases)}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_fault_is_found(pool, clean, planted):
    case = Case.parse(PLANTED[planted].case)
    (report,) = run_cases(pool, [case], planted)
    assert any(PLANTED[planted].found in fault for fault in report.faults), str(report)
    assert not clean[case].faults, str(clean[case])


# The table has these schedules on eight ranks; the lists below have four where those are enough.
OVERLAPPED = [
    Case.parse(text)
    for text in (
        "tensor=2 data=1 micro_batches=2 micro_batch=2",
        "tensor=4 data=1 kv_heads=2 masked=True sequence_parallel=False",
        "tensor=2 data=2 policy=layer_input precision=fp32 micro_batches=2",
        "tensor=8 data=1 kv_heads=1 vocab=13 tied=True policy=no_gate_up",
        "tensor=1 data=4 labels=unequal micro_batches=3",
        "tensor=2 data=1 pipeline=4 schedule=zb-h1 layers=4 micro_batches=5",
        "tensor=2 data=1 pipeline=2 schedule=zb-v layers=4 micro_batches=3 policy=layer_input",
        "tensor=2 data=2 pipeline=2 schedule=1f1b-fused layers=3 micro_batches=4 precision=fp32",
    )
]


@pytest.mark.parametrize("case", OVERLAPPED, ids=str)
def test_overlap_in_the_backward_changes_no_bit(pool, case):
    none, backward = run_each(pool, [replace(case, overlap=o) for o in ("none", "backward")])
    assert list(identical(none, backward)) == []


REPEATED = [
    Case.parse(text)
    for text in (
        "tensor=1 data=1 micro_batches=2",
        "tensor=2 data=4 overlap=full micro_batches=2 precision=fp32 micro_batch=2",
        "tensor=4 data=1 kv_heads=1 overlap=full",
        "tensor=1 data=8 labels=empty_rank precision=fp32",
        "tensor=4 data=2 masked=True tied=True",
        "tensor=2 data=2 pipeline=2 schedule=zb-v layers=4 micro_batches=4 tied=True late=True",
        "tensor=2 data=1 pipeline=2 schedule=interleaved-fused virtual=2 layers=4 micro_batches=3 "
        "overlap=full precision=fp32 late=True",
    )
]


@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_the_same_run_gives_the_same_bits(pool, case):
    assert list(identical(*run_each(pool, [case, case]))) == []


PIPELINES = [
    Case.parse(text)
    for text in (
        "tensor=2 data=1 pipeline=4 schedule=zb-h2 layers=5 micro_batches=6 tied=True",
        "tensor=1 data=2 pipeline=2 schedule=interleaved virtual=2 layers=5 micro_batches=3",
        "tensor=1 data=4 pipeline=2 schedule=zb-v layers=4 micro_batches=2 precision=fp32",
        "tensor=2 data=1 pipeline=2 kv_heads=1 layers=3 schedule=1f1b-fused micro_batches=4",
    )
]


@pytest.mark.parametrize("case", PIPELINES, ids=str)
def test_a_pipeline_changes_no_bit_beside_other_ranks_either(pool, case):
    flat = replace(case, pipeline=1, schedule="1f1b", virtual=1)
    shapes = solve(problem_of(case)).initial
    flat_runs, runs = run_each(pool, [flat, case])
    whole = [joined(ranks, shapes) for ranks in zip(*flat_runs, strict=True)]
    assert list(same_as_alone(runs, whole)) == []


def joined(ranks: Sequence[RankStep], shapes: Mapping[str, Tensor]) -> RankStep:
    """A step as one process would have it: the pieces of all ranks, put together."""
    faults = Faults()
    like = {name: tensor.numpy() for name, tensor in shapes.items()}

    def whole(kind: str) -> list[Piece]:
        tensors = assemble([getattr(rank, kind) for rank in ranks], like, kind, faults)
        return [Piece(name, (0,) * value.ndim, value) for name, value in tensors.items()]

    step = replace(ranks[0], gradients=whole("gradients"), weights=whole("weights"))
    assert not faults
    return step


def test_a_bf16_wire_rounds_gradients_and_no_more(pool):
    case = Case(tensor=2, data=4, micro_batches=2, wire="bf16")
    rounded, exact = run_each(pool, [case, replace(case, wire="fp32")])
    assert compare(case, solve(problem_of(case)), rounded) == []
    assert list(identical(rounded, exact))
