"""A whole job's check: rehearse a rank of each class, match all groups, look for circles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megallama.check.classes import classes
from megallama.check.matching import Fault, Ranks, match, weights
from megallama.check.program import Book
from megallama.check.rehearse import Rehearsal, rehearse, steps_of
from megallama.check.waiting import circle, forgotten
from megallama.config.schema import Config
from megallama.spec.collectives import Count
from megallama.spec.grid import Grid, Place
from megallama.spec.groups import group_members, run_schedule
from megallama.spec.memory import kept_bytes, rank_bytes
from megallama.spec.traffic import initial_traffic
from megallama.spec.workspaces import Device


@dataclass(frozen=True)
class Kind:
    """A class of ranks: its ranks, the rehearsal of the first, and the ledger of what it holds."""

    ranks: tuple[int, ...]
    rehearsal: Rehearsal
    ledger: dict[str, int]


@dataclass(frozen=True)
class Checked:
    """What a check found. `fault`: None where the job runs. `groups`: of two ranks or more;
    `operations`: of all ranks in all `steps`, the build included."""

    kinds: tuple[Kind, ...]
    groups: int
    operations: int
    steps: int
    fault: Fault | None


def check(config: Config, grid: Grid) -> Checked:
    """Check the job of `config` on a grid.

    Raises:
        ConfigError: the config cannot be laid out like this.
    """
    book, alike = Book(), classes(config, grid)
    found = [rehearse(config, Place(grid, ranks[0]), book) for ranks in alike]
    job = together(config, grid, found, alike)
    fault = faults(job, config)
    kinds = tuple(
        Kind(tuple(ranks), rehearsal, ledger(config, rehearsal.place))
        for ranks, rehearsal in zip(alike, found, strict=True)
    )
    fault = fault or next(filter(None, (memory(config, kind) for kind in kinds)), None)
    fault = fault or next(filter(None, (traffic(config, one) for one in found)), None)
    operations = sum(each.rehearsal.log.issued * len(each.ranks) for each in kinds)
    return Checked(kinds, sum(1 for _ in job.groups()), operations, len(steps_of(config)), fault)


def together(
    config: Config, grid: Grid, rehearsals: list[Rehearsal], alike: Iterable[Iterable[int]]
) -> Ranks:
    """The job in which each rehearsal stands for all ranks of its class."""
    rehearsal_of = [0] * grid.size
    for index, ranks in enumerate(alike):
        for rank in ranks:
            rehearsal_of[rank] = index
    links = run_schedule(config, grid).links
    members = [group_members(config, Place(grid, rank), links) for rank in range(grid.size)]
    return Ranks(rehearsals, rehearsal_of, members)


def faults(job: Ranks, config: Config) -> Fault | None:
    """The first fault: of groups and operations, then of waits, then of the weights' owners."""
    return match(job) or circle(job) or forgotten(job) or weights(job, config.model)


def ledger(config: Config, place: Place) -> dict[str, int]:
    """What a rank at `place` holds at the worst moment, by `spec.memory`."""
    actions = run_schedule(config, place.grid).actions[place.along("pipeline")]
    return rank_bytes(config, place, actions, _device(config))


def _device(config: Config) -> Device:
    """bf16 trains on GPUs, what is wider on CPUs (`train.device.choose_device`)."""
    return Device("cuda" if config.train.precision == "bf16" else "cpu")


def memory(config: Config, kind: Kind) -> Fault | None:
    """Where the rehearsal has other bytes than the ledger of the same name."""
    place = kind.rehearsal.place
    actions = run_schedule(config, place.grid).actions[place.along("pipeline")]
    said = kind.ledger | kept_bytes(config, place, actions)
    for name, counted in kind.rehearsal.bytes_held.items():
        if counted != said.get(name, 0):
            text = f"{name} on rank {place.rank}: {counted:,} bytes, the ledger says"
            return Fault("memory", f"{text} {said.get(name, 0):,}; this is a bug", (place.rank,))
    return None


def traffic(config: Config, rehearsal: Rehearsal) -> Fault | None:
    """Where a rank sends what `spec.traffic` does not say: in another group, say, as all do."""
    place, device = rehearsal.place, _device(config).type
    said = {"build": initial_traffic(config, place).counts}
    said |= {step.name: step.said(config, place, device) for step in steps_of(config)}
    for part in rehearsal.marks:
        sent = rehearsal.sent(part)
        for key in sorted(said[part].keys() | sent.keys()):
            found, formula = (_counted(each.get(key)) for each in (sent, said[part]))
            if found != formula:
                text = f"{part}, {key[1]} in group {key[0]!r} on rank {place.rank}: {found}"
                says = f"{text}, the formulas say {formula}; this is a bug"
                return Fault("traffic", says, (place.rank,))
    return None


def _counted(count: Count | None) -> str:
    return f"{count.calls:,} calls of {count.bytes:,} bytes in all" if count else "nothing"
