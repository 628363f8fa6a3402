"""What `megallama check` rehearses of a rank is what that rank really does, on gloo."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from megallama.check.program import Book, issued
from megallama.check.rehearse import OTHERS, How, names_of, rehearse
from megallama.dist.gloo import GlooGroup
from megallama.spec.grid import Place, make_grid
from megallama.train.replicas import Replicas
from tests.layouts.case import LR, Case
from tests.layouts.pool import Pool, Seat, Task
from tests.layouts.problem import batch, problem_of, share_of
from tests.layouts.walks import build

CASES = (
    "tensor=2 data=2 micro_batches=4 overlap=full vocab=61 labels=all",
    "tensor=4 data=2 kv_heads=1 sequence_parallel=False wire=bf16 vocab=9 policy=layer_input",
    "tensor=1 data=1 pipeline=4 micro_batches=6 tied=True schedule=zb-v layers=9",
    "tensor=2 data=2 pipeline=2 micro_batches=5 schedule=zb-h1 early=True overlap=none",
    "tensor=1 data=2 pipeline=2 micro_batches=5 schedule=1f1b-fused tied=True kv_heads=2",
)

#: (group, operation, shapes, label) in the order of issue, and counts as `dist.traffic` has them.
Done = tuple[list[tuple[Any, ...]], dict[tuple[str, str], tuple[int, int]]]


def really(seat: Seat, case: Case) -> Done:
    """On one rank: what its build and its first step ask of the groups."""
    asked: list[tuple[Any, ...]] = []
    names: dict[int, str] = {}
    submit, submit_point = GlooGroup._submit, GlooGroup._submit_point

    def collective(
        group: GlooGroup, run: Any, cover: int, operation: str, tensors: Any, wire: Any = None
    ) -> Any:
        label = ", ".join(names[id(t)] for t in tensors if id(t) in names)
        asked.append((group.name, operation, [tuple(t.shape) for t in tensors], label))
        return submit(group, run, cover, operation, tensors, wire)

    def point(
        group: GlooGroup, run: Any, operation: str, tensor: Any, peer: int, label: str
    ) -> Any:
        asked.append((group.name, operation, [tuple(tensor.shape)], label))
        return submit_point(group, run, operation, tensor, peer, label)

    with (
        mock.patch.object(GlooGroup, "_submit", collective),
        mock.patch.object(GlooGroup, "_submit_point", point),
    ):
        trainer = build(seat, case, grad_clip=1e9)
        try:
            names.update(names_of(trainer))
            replicas = Replicas(trainer)
            share = share_of(batch(problem_of(case), 0), trainer.place.along("data"), case.data)
            trainer.step.run(share, LR, False, lambda: (replicas.compare(), *OTHERS))
            counts = trainer.groups.traffic.counts
            return asked, {key: (count.calls, count.bytes) for key, count in counts.items()}
        finally:
            trainer.groups.close()


@pytest.mark.parametrize("text", CASES)
def test_a_rehearsal_asks_for_what_a_real_rank_asks_for(pool: Pool, text: str) -> None:
    case = Case.parse(text)
    outcome = pool.run(Task(case.ranks, really, (case,)))
    assert outcome.error is None, outcome.error
    config = case.config(1e9)
    grid = make_grid(config, case.ranks)
    for rank, (asked, counts) in enumerate(outcome.results):
        rehearsed = rehearse(config, Place(grid, rank), Book(), How(steps=1))
        events = [*rehearsed.part("build"), *rehearsed.part("step 1")]
        found = [
            (one.group, one.kind, list(one.shapes), one.label)
            for one in issued(rehearsed.log.book, events)
        ]
        assert found == asked, rank
        both = [rehearsed.sent(name) for name in ("build", "step 1")]
        total = {
            key: tuple(
                sum(getattr(sent[key], what) for sent in both if key in sent)
                for what in ("calls", "bytes")
            )
            for key in {*both[0], *both[1]}
        }
        assert total == counts, rank
