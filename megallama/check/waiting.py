"""Whether a job that matches comes to its end, or ranks wait for each other in a circle, and
whether each waits for all that it began.

An operation of a group runs when all of its ranks have issued it; a message too, so that a send
ends when its receive is posted and no sooner. Operations of one group run in their order, those of
different groups do not wait for each other. A rank goes on until it waits.

Ranks with equal programs move as one here. That is sound: an order in which all *programs* can run
their events is one in which all ranks can, each rank with its program, because a rank waits for no
more than its program does: a program's group is every program that some rank of it shares that
group with.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from dataclasses import dataclass

from megallama.check.matching import Fault, Ranks
from megallama.check.program import Operation


@dataclass
class _Runner:
    """A program under way, `at` its next event. By group name: `partners`, the programs that issue
    its operations too, and `reached`, how many it has issued. `stood`: of each operation issued,
    how many of its group came before."""

    events: array[int]
    partners: dict[str, tuple[int, ...]]
    reached: dict[str, int]
    issued: array[int]
    stood: array[int]
    at: int = 0

    @property
    def ended(self) -> bool:
        return self.at == len(self.events)


def circle(ranks: Ranks) -> Fault | None:
    """Ranks that wait for each other, each with its operation; None where all come to the end.

    To be asked of ranks that match.
    """
    run = _Run(ranks)
    run.go()
    return run.stuck()


def forgotten(ranks: Ranks) -> Fault | None:
    """An operation that some rank never waits for: what it fills or sends may be used too soon."""
    for program in sorted(set(ranks.program_of)):
        operation = ranks.rehearsals[program].forgotten
        if operation is not None:
            rank = ranks.program_of.index(program)
            text = f"rank {rank} never waits for {operation} in group {operation.group!r}"
            return Fault("wait", text, (rank,), (operation.site,))
    return None


class _Run:
    """All programs of a job, each going on until it waits for one that is not so far."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.operations = ranks, ranks.book.operations
        self.runners = {
            program: _Runner(
                ranks.rehearsals[program].log.events,
                partners,
                dict.fromkeys(partners, 0),
                array("l"),
                array("l"),
            )
            for program, partners in _partners(ranks).items()
        }
        #: (program, group, count) → who waits until the program has issued so many there.
        self.waiting: defaultdict[tuple[int, str, int], list[int]] = defaultdict(list)

    def go(self) -> None:
        """Run every program as far as it comes."""
        ready = list(self.runners)
        while ready:
            ready += self._advance(ready.pop())

    def _advance(self, program: int) -> list[int]:
        """Run a program until it waits or ends; returns those that it kept waiting."""
        runner, woken = self.runners[program], list[int]()
        events, reached = runner.events, runner.reached
        while runner.at < len(events):
            event = events[runner.at]
            if event < 0:
                late = self._late(runner)
                if late is not None:
                    self.waiting[late].append(program)
                    break
            else:
                group = self.operations[event].group
                runner.issued.append(event)
                runner.stood.append(reached[group])
                reached[group] += 1
                woken += self.waiting.pop((program, group, reached[group]), ())
            runner.at += 1
        return woken

    def _late(self, runner: _Runner) -> tuple[int, str, int] | None:
        """Of the wait that is next: a program that has not issued so many operations there yet."""
        place = -1 - runner.events[runner.at]
        group, count = self.operations[runner.issued[place]].group, runner.stood[place] + 1
        for partner in runner.partners[group]:
            if self.runners[partner].reached[group] < count:
                return partner, group, count
        return None

    def stuck(self) -> Fault | None:
        """The circle, where some rank has not come to its end."""
        left = [program for program, runner in self.runners.items() if not runner.ended]
        if not left:
            return None
        path = [self.ranks.program_of.index(left[0])]
        while (following := self._waits_for(path[-1])) not in path:
            path.append(following)
        return self._describe(path[path.index(following) :])

    def _waits_for(self, rank: int) -> int:
        """A rank that one that is stuck waits for: of its own group, where that tells."""
        of = self.ranks.program_of
        late = self._late(self.runners[of[rank]])
        assert late is not None, "a rank that is stuck is so at a wait"
        program, group, count = late
        for other in self.ranks.members[rank][group]:
            if self.runners[of[other]].reached[group] < count:
                return other
        return of.index(program)

    def _describe(self, path: list[int]) -> Fault:
        runners = [self.runners[self.ranks.program_of[rank]] for rank in path]
        waits = [self._waited_for(runner) for runner in runners]
        lines = [
            f"rank {rank} waits for {operation} in group {operation.group!r}, "
            f"to which rank {other} has not come"
            for rank, other, operation in zip(path, [*path[1:], path[0]], waits, strict=True)
        ]
        text = f"{len(path)} ranks wait in a circle: {'; '.join(lines)}"
        return Fault("deadlock", text, tuple(path), tuple(o.site for o in waits))

    def _waited_for(self, runner: _Runner) -> Operation:
        return self.operations[runner.issued[-1 - runner.events[runner.at]]]


def _partners(ranks: Ranks) -> dict[int, dict[str, tuple[int, ...]]]:
    """Program → group name → the programs of all ranks with which its ranks share such a group."""
    found: dict[int, dict[str, set[int]]] = {program: {} for program in set(ranks.program_of)}
    for name, group in ranks.groups():
        programs = {ranks.program_of[rank] for rank in group}
        for program in programs:
            found[program].setdefault(name, set()).update(programs)
    return {
        program: {name: tuple(sorted(others)) for name, others in by_name.items()}
        for program, by_name in sorted(found.items())
    }
