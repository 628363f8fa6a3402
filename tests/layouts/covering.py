"""Which cases the table runs: a greedy covering array over the axes of a case.

`default` covers every pair of values of two axes; `full` every pair, and every triple of layout,
overlap and policy. A case is completed value by value, each chosen to cover the most that is still
uncovered, ties broken by a seeded draw; the best of a few tries is taken. `CORNERS` are cases that
the axes do not reach.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from typing import Any

from tests.layouts.case import LABELS, OVERLAPS, POLICIES, Case

Values = dict[str, Any]  # of some axes
Cover = frozenset[tuple[str, Any]]  # a pair or a triple: values of two or three axes

#: Every way to write 1, 2, 4 and 8 as tensor × data.
LAYOUTS = tuple((t, n // t) for n in (1, 2, 4, 8) for t in (1, 2, 4, 8) if n % t == 0)

AXES: dict[str, tuple[Any, ...]] = {
    "layout": LAYOUTS,
    "policy": POLICIES,
    "labels": LABELS,
    "attention": ("MHA", "GQA 4", "GQA 2", "MQA"),
    "overlap": OVERLAPS,
    "vocabulary": (64, 61, 13),
    "micro-batches": (1, 2, 3),
    "sequence parallel": (True, False),
    "micro-batch": (1, 2),
    "precision": ("fp64", "fp32"),
    "widths": ("round", "odd"),
    "tied": (False, True),
    "masked": (False, True),
    "late": (False, True),
}
TRIPLE = ("layout", "overlap", "policy")
KV_HEADS = {"MHA": 8, "GQA 4": 4, "GQA 2": 2, "MQA": 1}
TRIES = 8

#: Shards with padded rows in norms too (18 rows over 4 and 8 ranks); more ranks than vocabulary;
#: one layer; a sequence of one token a tensor rank.
CORNERS = tuple(
    Case.parse(text)
    for text in (
        "tensor=1 data=4 heads=3 kv_heads=3 d_model=18 ffn=13 vocab=19 micro_batches=2",
        "tensor=1 data=8 heads=3 kv_heads=1 d_model=18 ffn=13 vocab=5 tied=True",
        "tensor=8 data=1 kv_heads=2 vocab=5 layers=1 masked=True overlap=full",
        "tensor=8 data=1 kv_heads=1 sequence=8 ffn=8 policy=layer_input",
        "tensor=4 data=2 kv_heads=2 vocab=9 labels=empty_rank precision=fp32",
    )
)


@dataclass(frozen=True)
class Table:
    """Cases, and how many of the pairs and triples that exist they cover."""

    cases: tuple[Case, ...]
    pairs: tuple[int, int]
    triples: tuple[int, int]


def allowed(values: Mapping[str, Any]) -> bool:
    """Whether such a case exists: a rank without labels must not be the only one."""
    return values.get("labels") != "empty_rank" or values.get("layout", (1, 2))[1] > 1


def case_of(values: Mapping[str, Any]) -> Case:
    """The case that has these values on all axes."""
    tensor, data = values["layout"]
    odd = values["widths"] == "odd"
    return Case(
        tensor=tensor,
        data=data,
        sequence_parallel=values["sequence parallel"],
        overlap=values["overlap"],
        policy=values["policy"],
        kv_heads=KV_HEADS[values["attention"]],
        vocab=values["vocabulary"],
        tied=values["tied"],
        masked=values["masked"],
        labels=values["labels"],
        micro_batches=values["micro-batches"],
        micro_batch=values["micro-batch"],
        precision=values["precision"],
        late=values["late"],
        d_model=48 if odd else 32,
        ffn={1: 45, 2: 46, 4: 44, 8: 40}[tensor] if odd else 40,  # odd on each tensor rank
    )


def default_table() -> Table:
    """Every pair."""
    return _table(set())


def full_table() -> Table:
    """Every pair, and every triple of TRIPLE."""
    return _table(set(_all_covers(TRIPLE, 3)))


@cache
def _pairs() -> frozenset[Cover]:
    return frozenset(_all_covers(tuple(AXES), 2))


def _all_covers(axes: tuple[str, ...], size: int) -> Iterator[Cover]:
    for chosen in combinations(axes, size):
        for values in product(*(AXES[axis] for axis in chosen)):
            if allowed(dict(zip(chosen, values, strict=True))):
                yield frozenset(zip(chosen, values, strict=True))


def _table(triples: set[Cover]) -> Table:
    generator = random.Random(0)
    pairs = set(_pairs())
    rows: list[Values] = []
    while triples or pairs:
        # The order of a set of text differs from run to run.
        start = dict(min(triples or pairs, key=_order))
        tries = [_complete(start, pairs, generator) for _ in range(TRIES)]
        best = max(tries, key=lambda values: len(pairs & _covered(values, 2)))
        pairs -= _covered(best, 2)
        triples -= _covered(best, 3)
        rows.append(best)
    return Table(
        (*map(case_of, rows), *CORNERS),
        _count(rows, _pairs(), 2),
        _count(rows, frozenset(_all_covers(TRIPLE, 3)), 3),
    )


def _complete(start: Values, pairs: set[Cover], generator: random.Random) -> Values:
    """Values on all axes, with `start` among them."""
    values = dict(start)
    axes = [axis for axis in AXES if axis not in values]
    generator.shuffle(axes)
    for axis in axes:
        choices = [v for v in AXES[axis] if allowed(values | {axis: v})]
        generator.shuffle(choices)
        values[axis] = max(choices, key=lambda value: _gain(values, (axis, value), pairs))
    return values


def _gain(values: Values, new: tuple[str, Any], pairs: set[Cover]) -> int:
    return sum(frozenset((new, old)) in pairs for old in values.items())


def _covered(values: Values, size: int) -> set[Cover]:
    return {frozenset(chosen) for chosen in combinations(values.items(), size)}


def _count(rows: Iterable[Values], wanted: frozenset[Cover], size: int) -> tuple[int, int]:
    covered = set().union(*(_covered(values, size) for values in rows))
    return len(covered & wanted), len(wanted)


def _order(cover: Cover) -> tuple[tuple[int, int], ...]:
    """A total order: by axis, then by value, in the order in which they are written above."""
    names = list(AXES)
    return tuple(sorted((names.index(axis), AXES[axis].index(v)) for axis, v in cover))


def markdown(tables: Mapping[str, Table]) -> str:
    """The counts as a table, as the documentation shows it."""
    lines = [
        "| table | cases | pairs of values | layout × overlap × policy |",
        "|---|---:|---:|---:|",
    ]
    for name, table in tables.items():
        pairs, triples = ("{} of {}".format(*count) for count in (table.pairs, table.triples))
        lines.append(f"| {name} | {len(table.cases)} | {pairs} | {triples} |")
    axes = (f"{axis} ({len(values)})" for axis, values in AXES.items())
    return "\n".join([*lines, "", f"Axes, with their numbers of values: {', '.join(axes)}."])
