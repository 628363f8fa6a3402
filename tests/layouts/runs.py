"""Cases on the pool, each held against its reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from tests.layouts import body
from tests.layouts.case import Case
from tests.layouts.compare import RankStep, compare, same_as_alone
from tests.layouts.pool import Outcome, Pool, Task
from tests.layouts.problem import problem_of, solve

Runs = list[list[RankStep]]  # of every rank, every step


@dataclass(frozen=True)
class Report:
    """A case that ran, and what was wrong with it."""

    case: Case
    faults: list[str]
    seconds: float

    def __str__(self) -> str:
        """A command that repeats the case, and the first of its faults."""
        shown, more = self.faults[:20], len(self.faults) - 20
        lines = [f'python -m tests.layouts "{self.case}"', *(f"    {fault}" for fault in shown)]
        if more > 0:
            lines.append(f"    and {more} more")
        return "\n".join(lines)


def run_cases(pool: Pool, cases: Iterable[Case], planted: str | None = None) -> Iterator[Report]:
    """A report of each case, as they end.

    A case with a twin in one process is held against that too, bit by bit.
    """
    tasks = _Tasks(cases, planted)
    ended: dict[Case, Outcome] = {}
    for number, outcome in pool.run_all(tasks):
        case, is_twin = tasks.started.pop(number)
        (tasks.twins if is_twin else ended)[case] = outcome
        for one in [one for one in ended if one.twin is None or tasks.twins.get(one.twin)]:
            outcome = ended.pop(one)
            faults = faults_of(one, outcome)
            if one.twin is not None and outcome.error is None:
                faults += _unlike(outcome, tasks.twins[one.twin])
            yield Report(one, faults, outcome.seconds)


class _Tasks:
    """The tasks of cases, each twin's before those of its cases. `started`: by a task's number."""

    def __init__(self, cases: Iterable[Case], planted: str | None) -> None:
        self._cases, self._planted = cases, planted
        self.started: dict[int, tuple[Case, bool]] = {}
        self.twins: dict[Case, Outcome | None] = {}

    def __iter__(self) -> Iterator[Task]:
        numbers = count()
        for case in self._cases:
            if case.twin is not None and case.twin not in self.twins:
                self.twins[case.twin] = None
                self.started[next(numbers)] = case.twin, True
                yield task_of(case.twin)
            self.started[next(numbers)] = case, False
            yield task_of(case, self._planted)


def _unlike(outcome: Outcome, twin: Outcome | None) -> list[str]:
    """Where the outcome of a case differs from its twin's."""
    assert twin is not None
    if twin.error is not None:
        return [f"in one process: {twin.error}"]
    return list(same_as_alone(outcome.results, twin.results[0]))


def task_of(case: Case, planted: str | None = None) -> Task:
    """What the pool runs for a case."""
    grad_clip = solve(problem_of(case)).grad_clip
    return Task(case.ranks, body.run, (case, grad_clip, planted))


def faults_of(case: Case, outcome: Outcome) -> list[str]:
    """What is wrong with the outcome of a case."""
    if outcome.error is not None:
        return [outcome.error]
    return compare(case, solve(problem_of(case)), outcome.results)


def run_each(pool: Pool, cases: Sequence[Case]) -> list[Runs]:
    """What the ranks of each case came to; cases run side by side where they fit.

    Raises AssertionError where one failed.
    """
    outcomes = dict(pool.run_all(map(task_of, cases)))
    errors = [outcome.error for outcome in outcomes.values() if outcome.error is not None]
    assert not errors, errors[0]
    return [outcomes[number].results for number in range(len(cases))]


def summary(reports: Sequence[Report]) -> str:
    """Cases and failures by the number of ranks, as a table."""
    cases, failed = Counter[int](), Counter[int]()
    for report in reports:
        cases[report.case.ranks] += 1
        failed[report.case.ranks] += bool(report.faults)
    lines = ["| ranks | cases | failed |", "|---:|---:|---:|"]
    lines += [f"| {ranks} | {cases[ranks]} | {failed[ranks]} |" for ranks in sorted(cases)]
    return "\n".join([*lines, f"| all | {cases.total()} | {failed.total()} |"])
