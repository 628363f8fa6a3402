"""Clean jobs pass; a class stands for its ranks, and a replayed pass for the real one."""

from __future__ import annotations

import pytest

from megallama.check.classes import classes
from megallama.check.job import check
from megallama.check.program import Book
from megallama.check.rehearse import How, Rehearsal, rehearse
from megallama.config.load import parse_config
from megallama.config.schema import Config
from megallama.spec.grid import Place, make_grid
from megallama.spec.traffic import initial_traffic, step_traffic
from tests.check.draw import draw
from tests.layouts.case import Case

#: Each has what makes ranks differ, and four micro-batches or more, so that some are replayed.
CASES = (
    "tensor=2 data=2 micro_batches=4 overlap=full vocab=61 labels=all",
    "tensor=4 data=2 micro_batches=4 kv_heads=1 sequence_parallel=False wire=bf16 vocab=9",
    "tensor=1 data=1 pipeline=4 micro_batches=6 tied=True schedule=zb-v layers=9",
    "tensor=2 data=1 pipeline=2 micro_batches=5 schedule=zb-h1 early=True policy=layer_input",
    "tensor=2 data=1 pipeline=2 micro_batches=7 schedule=interleaved-fused virtual=2 layers=5",
    "tensor=1 data=3 pipeline=2 micro_batches=5 schedule=1f1b-fused overlap=none kv_heads=2",
)


@pytest.mark.parametrize("text", CASES)
def test_every_rank_alone_does_what_its_class_does_with_passes_replayed(text: str) -> None:
    config, grid = job(text)
    book = Book()
    for ranks in classes(config, grid):
        one = rehearse(config, Place(grid, ranks[0]), book)
        for rank in ranks:
            other = rehearse(config, Place(grid, rank), book, How(everything=True))
            assert other.log.events == one.log.events, rank
            assert other.bytes_held == one.bytes_held
            assert other.owned == one.owned


@pytest.mark.parametrize("number", range(12))
def test_drawn_jobs_pass(number: int) -> None:
    config, ranks = draw(1, 2 * number + 1)  # odd ones have few ranks
    checked = check(config, make_grid(config, ranks))
    assert checked.fault is None
    assert checked.groups == 0 or checked.operations


@pytest.mark.parametrize("text", CASES)
def test_the_bytes_of_a_step_are_those_of_the_formulas(text: str) -> None:
    config, grid = job(text, compares=False)
    for ranks in classes(config, grid):
        place = Place(grid, ranks[0])
        one = rehearse(config, place, Book())
        assert counts(one, "build") == initial_traffic(config, place).counts
        updates = {
            "step 1": 1,
            "step 2": 1,
            "a step that is left out": 2 if config.parallel.early_step else 0,
            "a step after one that was left out": 1,
        }
        for name, times in updates.items():
            said = step_traffic(config, place, "cpu", updates=times)
            assert counts(one, name) == said.counts, (ranks[0], name)


@pytest.mark.parametrize("text", CASES)
def test_the_second_step_repeats_the_first(text: str) -> None:
    """Both begin with an update's weights on their way, and end so: all later ones do, then."""
    config, grid = job(text)
    for ranks in classes(config, grid):
        one = rehearse(config, Place(grid, ranks[0]), Book(), How(steps=2))
        first, second = relative(one, "step 1"), relative(one, "step 2")
        assert first == second
        assert len(first) > 10


def relative(one: Rehearsal, name: str) -> list[int]:
    """A step's events; waits are for the n-th operation since it began, or before it (n < 0)."""
    names = list(one.marks)
    before = sum(event >= 0 for event in one.log.events[: one.marks[names[names.index(name) - 1]]])
    shift = 1 << 40  # apart from operations, whatever the sign
    return [event if event >= 0 else shift - 1 - event - before for event in one.part(name)]


def test_a_job_of_one_rank_asks_for_nothing() -> None:
    config, grid = job("tensor=1 data=1 micro_batches=2")
    checked = check(config, grid)
    assert (checked.fault, checked.groups, checked.operations) == (None, 0, 0)


def counts(one: Rehearsal, name: str) -> dict[tuple[str, str], tuple[int, int]]:
    return {key: (count.calls, count.bytes) for key, count in one.sent(name).items()}


def job(text: str, compares: bool = True):  # type: ignore[no-untyped-def]
    case = Case.parse(text)
    config = case.config(1.0)
    if not compares:
        config = without_comparison(config)
    return config, make_grid(config, case.ranks)


def without_comparison(config: Config) -> Config:
    """The formulas leave out what replicas compare."""
    values = config.model_dump(mode="json")
    values["train"]["check_replicas_every"] = 0
    return parse_config(values)
