"""A rank holds and sends what the ledger and the formulas say, byte for byte, with every pair of
save policy, schedule, layout and what else changes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest

from megallama.check.job import Kind, ledger, memory, traffic
from megallama.check.program import Book
from megallama.check.rehearse import How, rehearse
from megallama.spec.grid import Place, make_grid
from tests.layouts.case import OVERLAPS, POLICIES, SCHEDULES, Case

AXES: dict[str, Sequence[Any]] = {
    "schedule": SCHEDULES,
    "policy": POLICIES,
    "tensor": (1, 2, 4),
    "data": (1, 2),
    "overlap": OVERLAPS,
    "kv_heads": (8, 2, 1),
    "sequence_parallel": (True, False),
    "tied": (False, True),
    "early": (False, True),
    "precision": ("bf16", "fp32", "fp64"),
    "wire": ("fp32", "bf16"),
    "micro_batches": (1, 4),
}


def rows(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Values of all axes, so that every two values of two axes are together in some row."""
    left = {
        frozenset(pair)
        for (a, some), (b, others) in combinations(axes.items(), 2)
        for pair in product([(a, value) for value in some], [(b, value) for value in others])
    }
    found: list[dict[str, Any]] = []
    while left:
        row = dict(min(left, key=lambda pair: sorted(map(str, pair))))
        for axis in axes:
            if axis not in row:
                gains = {v: _gain(left, row, (axis, v)) for v in axes[axis]}
                row[axis] = max(gains, key=gains.__getitem__)
        left -= {frozenset(pair) for pair in combinations(row.items(), 2)}
        found.append({axis: row[axis] for axis in axes})  # a set's order is another in each process
    return found


def _gain(left: set[frozenset[Any]], row: Mapping[str, Any], new: tuple[str, Any]) -> int:
    """How many pairs of `left` a value adds to a row."""
    return sum(frozenset((new, old)) in left for old in row.items())


ROWS = rows(AXES)


def test_the_rows_have_every_pair() -> None:
    for (a, some), (b, others) in combinations(AXES.items(), 2):
        together = {(row[a], row[b]) for row in ROWS}
        assert together == set(product(some, others)), (a, b)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(map(str, row.values())))
def test_a_rank_holds_and_sends_what_is_said(row: dict[str, Any]) -> None:
    virtual = 2 if row["schedule"].startswith("interleaved") else 1
    case = Case(pipeline=2, virtual=virtual, layers=4, vocab=61, **row)
    config = case.config(1.0)
    grid = make_grid(config, case.ranks)
    for rank in (0, grid.size - 1):
        place = Place(grid, rank)
        one = rehearse(config, place, Book(), How(steps=1))
        kind = Kind((rank,), one, ledger(config, place))
        assert memory(config, kind) is None
        assert traffic(config, one) is None
