"""Cases on the pool, each held against its reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tests.layouts import body
from tests.layouts.case import Case
from tests.layouts.compare import RankStep, compare
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
    """A report of each case, as they end."""
    started: dict[int, Case] = {}

    def tasks() -> Iterator[Task]:
        for number, case in enumerate(cases):
            started[number] = case
            yield task_of(case, planted)

    for number, outcome in pool.run_all(tasks()):
        case = started.pop(number)
        yield Report(case, faults_of(case, outcome), outcome.seconds)


def task_of(case: Case, planted: str | None = None) -> Task:
    """What the pool runs for a case."""
    grad_clip = solve(problem_of(case)).grad_clip
    return Task(case.ranks, body.run, (case, grad_clip, planted))


def faults_of(case: Case, outcome: Outcome) -> list[str]:
    """What is wrong with the outcome of a case."""
    if outcome.error is not None:
        return [outcome.error]
    return compare(case, solve(problem_of(case)), outcome.results)


def run_once(pool: Pool, case: Case) -> Runs:
    """What every rank came to. Raises AssertionError where one failed."""
    outcome = pool.run(task_of(case))
    assert outcome.error is None, outcome.error
    return outcome.results


def summary(reports: Sequence[Report]) -> str:
    """Cases and failures by the number of ranks, as a table."""
    cases, failed = Counter[int](), Counter[int]()
    for report in reports:
        cases[report.case.ranks] += 1
        failed[report.case.ranks] += bool(report.faults)
    lines = ["| ranks | cases | failed |", "|---:|---:|---:|"]
    lines += [f"| {ranks} | {cases[ranks]} | {failed[ranks]} |" for ranks in sorted(cases)]
    return "\n".join([*lines, f"| all | {cases.total()} | {failed.total()} |"])
