"""Whole runs whose disk refuses an operation of a save or of a row: each kind of them once."""

from __future__ import annotations

import errno
from itertools import cycle

import pytest

from tests.chaos.refusals import CODES, KINDS, OPEN, ROW, Range, Refusal
from tests.conftest import TinyData


@pytest.fixture(scope="module")
def ground(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Range:
    return Range(tmp_path_factory.mktemp("refusals"), tiny_data)


CASES = [
    Refusal("one", 0, kind, 1 if kind in ("unlink", "rmdir", OPEN) else 2, code, False)
    for kind, code in zip(KINDS, cycle(CODES))
]
#: A disk that stays full or broken, of the rank that does not lead; and one that takes no rows.
LASTING = [Refusal("data", 1, "sync", 2, code, True) for code in CODES[:2]]
LASTING += [Refusal("one", 0, ROW, 3, errno.ENOSPC, True)]


@pytest.mark.parametrize("case", [*CASES, *LASTING], ids=str)
def test_the_run_lives_on_or_ends_by_its_code(ground: Range, case: Refusal) -> None:
    assert ground.faults_of(case) == []


def test_every_operation_is_among_the_cases(ground: Range) -> None:
    cases = list(ground.every("one"))
    assert {case.kind for case in cases} == set(KINDS)
    assert {case.code for case in cases} == {errno.EIO, errno.ENOSPC, errno.EDQUOT}
    counts = {kind: max(c.call for c in cases if c.kind == kind) for kind in KINDS}
    assert counts["create"] == 6, "a rank's file and a manifest, three times"
    assert counts["rename"] == 3
    assert counts[ROW] == 6, "a row a step"
