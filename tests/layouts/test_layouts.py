"""The equivalence table's covering set: every layout gives the numbers of one process."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.layouts.case import Case
from tests.layouts.compare import identical
from tests.layouts.covering import default_table
from tests.layouts.planted import PLANTED
from tests.layouts.pool import Pool
from tests.layouts.rounding import steady
from tests.layouts.runs import Report, run_cases, run_once

CASES = default_table().cases


@pytest.fixture(scope="module")
def reports(pool: Pool) -> dict[Case, Report]:
    """All cases, run side by side."""
    reports = run_cases(pool, map(steady, CASES))
    return {replace(report.case, seed=0): report for report in reports}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layout_is_the_reference(reports, case):
    report = reports[case]
    assert not report.faults, str(report)


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_fault_is_found(pool, planted):
    case = Case.parse(PLANTED[planted].case)
    report, *_ = run_cases(pool, [case], planted)
    assert any(PLANTED[planted].found in fault for fault in report.faults), str(report)
    (report,) = run_cases(pool, [case])
    assert not report.faults, str(report)


OVERLAPPED = [
    Case.parse(text)
    for text in (
        "tensor=2 data=1 micro_batches=2 micro_batch=2",
        "tensor=4 data=1 kv_heads=2 masked=True sequence_parallel=False",
        "tensor=2 data=2 policy=layer_input precision=fp32 micro_batches=2",
        "tensor=8 data=1 kv_heads=1 vocab=13 tied=True policy=no_gate_up",
        "tensor=1 data=4 labels=unequal micro_batches=3",
    )
]


@pytest.mark.parametrize("case", OVERLAPPED, ids=str)
def test_overlap_in_the_backward_changes_no_bit(pool, case):
    none, backward = (run_once(pool, replace(case, overlap=o)) for o in ("none", "backward"))
    assert list(identical(none, backward)) == []


REPEATED = [
    Case.parse(text)
    for text in (
        "tensor=1 data=1 micro_batches=2",
        "tensor=2 data=4 overlap=full micro_batches=2 precision=fp32 micro_batch=2",
        "tensor=8 data=1 kv_heads=2 overlap=full",
        "tensor=1 data=8 labels=empty_rank precision=fp32",
        "tensor=4 data=2 masked=True tied=True",
    )
]


@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_the_same_run_gives_the_same_bits(pool, case):
    assert list(identical(run_once(pool, case), run_once(pool, case))) == []


def test_a_bf16_wire_rounds_gradients_and_no_more(pool):
    case = Case(tensor=2, data=4, micro_batches=2, wire="bf16")
    (report,) = run_cases(pool, [case])
    assert not report.faults, str(report)
    assert list(identical(run_once(pool, case), run_once(pool, replace(case, wire="fp32"))))
