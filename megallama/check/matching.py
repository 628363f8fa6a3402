"""Whether ranks of a group ask for the same operations, and together own as much as there is."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from megallama.check.program import Book, Operation
from megallama.check.rehearse import Rehearsal
from megallama.config.schema import Model
from megallama.spec.parameters import parameter_table

#: Ranks of a group that are listed one by one.
LISTED = 8


@dataclass(frozen=True)
class Fault:
    """What is wrong with a job, in one line or a few. `kind`: groups, mismatch, deadlock, wait,
    weights, memory, traffic. `ranks`: those that are named; `sites`: file and line at each of them,
    where they have one."""

    kind: str
    text: str
    ranks: tuple[int, ...] = ()
    sites: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ranks:
    """The ranks of a job: of each its groups' members, and whose program is its own.

    `rehearsal_of`: of each rank, the index of what stands for it in `rehearsals`.
    """

    rehearsals: Sequence[Rehearsal]
    rehearsal_of: Sequence[int]
    members: Sequence[Mapping[str, tuple[int, ...]]]

    @property
    def book(self) -> Book:
        return self.rehearsals[0].log.book

    @cached_property
    def program_of(self) -> list[int]:
        """Of each rank the first rehearsal with the same program."""
        first: dict[bytes, int] = {}
        same = [
            first.setdefault(hashlib.blake2b(rehearsal.log.events).digest(), index)
            for index, rehearsal in enumerate(self.rehearsals)
        ]
        return [same[index] for index in self.rehearsal_of]

    @cached_property
    def streams(self) -> dict[int, dict[str, Stream]]:
        """Of each program the streams of its groups."""
        return {program: _streams(self.rehearsals[program]) for program in set(self.program_of)}

    def groups(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every group of two ranks or more, once."""
        seen = set()
        for mine in self.members:
            for name, ranks in mine.items():
                if len(ranks) > 1 and (name, ranks) not in seen:
                    seen.add((name, ranks))
                    yield name, ranks


@dataclass(frozen=True)
class Stream:
    """The operations of one group in order: their meanings, and where each stands in the program
    (`events` of the log)."""

    meanings: array[int]
    places: array[int]


def _streams(rehearsal: Rehearsal) -> dict[str, Stream]:
    book, found = rehearsal.log.book, dict[str, Stream]()
    for place, event in enumerate(rehearsal.log.events):
        if event >= 0:
            name = book.operations[event].group
            stream = found.get(name)
            if stream is None:
                stream = found[name] = Stream(array("l"), array("l"))
            stream.meanings.append(book.meanings[event])
            stream.places.append(place)
    return found


def match(ranks: Ranks) -> Fault | None:
    """The first fault among the groups; None where all members of every group agree."""
    return _different_members(ranks) or _different_operations(ranks)


def _different_members(ranks: Ranks) -> Fault | None:
    """Ranks that connect to a group in which others are not: they would wait for them for ever."""
    for name, group in ranks.groups():
        for rank in group:
            theirs = ranks.members[rank].get(name)
            if theirs != group:
                one = next(r for r in group if ranks.members[r].get(name) == group)
                has = f"has it with ranks {_listed(theirs)}" if theirs else "has no such group"
                text = f"group {name!r}: rank {one} has it with ranks {_listed(group)}, rank {rank}"
                return Fault("groups", f"{text} {has}", (one, rank))
    return None


def _different_operations(ranks: Ranks) -> Fault | None:
    """Of all operations on which a group's members differ, the one that a rank reaches first."""
    empty = Stream(array("l"), array("l"))
    alike: set[tuple[str, tuple[int, ...]]] = set()
    found: list[tuple[int, Fault]] = []
    for name, group in ranks.groups():
        programs = tuple(sorted({ranks.program_of[rank] for rank in group}))
        if (name, programs) in alike:
            continue
        streams = [ranks.streams[program].get(name, empty) for program in programs]
        if all(stream.meanings == streams[0].meanings for stream in streams):
            alike.add((name, programs))
            continue
        found.append(_first_difference(ranks, name, group, empty))
    return min(found, key=lambda one: one[0])[1] if found else None


def _first_difference(
    ranks: Ranks, name: str, group: tuple[int, ...], empty: Stream
) -> tuple[int, Fault]:
    """Where in a program it stands, and the fault."""
    streams = {rank: ranks.streams[ranks.program_of[rank]].get(name, empty) for rank in group}
    one = group[0]
    first = streams[one].meanings

    def agree(rank: int) -> int:
        """How many operations agree with those of the first member."""
        theirs = streams[rank].meanings
        pairs = enumerate(zip(first, theirs, strict=False))
        return next((k for k, (a, b) in pairs if a != b), min(len(first), len(theirs)))

    other = min((rank for rank in group if streams[rank].meanings != first), key=agree)
    number = agree(other)
    said = [_operation(ranks, rank, streams[rank], number) for rank in (one, other)]
    texts = [
        f"rank {rank} {f'asks for {operation}' if operation else 'asks for nothing more'}"
        for rank, operation in zip((one, other), said, strict=True)
    ]
    where = f"group {name!r} of ranks {_listed(group)}, operation {number}"
    sites = tuple("" if operation is None else operation.site for operation in said)
    places = [s.places[number] for s in (streams[one], streams[other]) if number < len(s.places)]
    return min(places), Fault("mismatch", f"{where}: {'; '.join(texts)}", (one, other), sites)


def _operation(ranks: Ranks, rank: int, stream: Stream, number: int) -> Operation | None:
    if number >= len(stream.places):
        return None
    log = ranks.rehearsals[ranks.program_of[rank]].log
    return log.book.operations[log.events[stream.places[number]]]


def weights(ranks: Ranks, model: Model) -> Fault | None:
    """A parameter of which all ranks together do not own as many elements as it has.

    They are counted: as many as the model has, on all ranks together.
    """
    owned: Counter[str] = Counter()
    for index, times in Counter(ranks.rehearsal_of).items():
        for name, count in ranks.rehearsals[index].owned.items():
            owned[name] += times * count
    for parameter in parameter_table(model):
        count = owned.pop(parameter.name, 0)
        if count != parameter.numel:
            text = f"{parameter.name} has {parameter.numel:,} elements, and the ranks own {count:,}"
            return Fault("weights", f"{text}; each is to have one owner")
    if owned:
        return Fault("weights", f"{min(owned)} is on some rank, and not in the model")
    return None


def _listed(group: Sequence[int]) -> str:
    """0, 1, 2 …; a range where it is one; the ends where there are many."""
    step = group[1] - group[0] if len(group) > 1 else 1
    if len(group) > 2 and list(group) == list(range(group[0], group[-1] + 1, step or 1)):
        return f"{group[0]} to {group[-1]}" + (f" by {step}" if step != 1 else "")
    if len(group) > LISTED:
        return f"{', '.join(map(str, group[:3]))} … {group[-1]} ({len(group)} in all)"
    return ", ".join(map(str, group))
