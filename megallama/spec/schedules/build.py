"""A schedule by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType

from megallama.config.schedules import VIRTUAL_STAGES
from megallama.errors import ConfigError
from megallama.spec.schedules.actions import Schedule
from megallama.spec.schedules.messages import Slot, only_forward, whole_lists
from megallama.spec.schedules.plain import gpipe, interleaved, one_f_one_b
from megallama.spec.schedules.zero_bubble import joined, zb_h1, zb_h2, zb_v

NAMES: tuple[str, ...] = tuple(VIRTUAL_STAGES)

_Ranks = list[list[Slot]]
_ONE_CHUNK: Mapping[str, Callable[[int, int], _Ranks]] = MappingProxyType(
    {"gpipe": gpipe, "1f1b": one_f_one_b, "zb-h1": zb_h1, "zb-h2": zb_h2, "zb-v": zb_v}
)


def chunk_owners(name: str, stages: int, virtual_stages: int) -> tuple[int, ...]:
    """The pipeline rank of every chunk: round and round, for zb-v down the ranks and back."""
    chunks = stages * virtual_stages
    if name == "zb-v":
        return tuple(min(chunk, chunks - 1 - chunk) for chunk in range(chunks))
    return tuple(chunk % stages for chunk in range(chunks))


@lru_cache(maxsize=64)
def make_schedule(name: str, stages: int, micro_batches: int, virtual_stages: int = 1) -> Schedule:
    """The lists of all `stages` ranks. Every number of micro-batches is taken.

    B and W of a chunk run in ascending order of micro-batches in every schedule, so that the sums
    of gradients have one order and all schedules give the same bits.

    Raises:
        ConfigError: an unknown name, a count below 1, or virtual stages the schedule does not take.
    """
    _check(name, stages, micro_batches, virtual_stages)
    owners = chunk_owners(name, stages, virtual_stages)
    ranks = _ranks(name, stages, micro_batches, virtual_stages)
    whole = whole_lists([joined(actions, owners) for actions in ranks], owners)
    return Schedule(name, micro_batches, owners, whole)


def forward_only(schedule: Schedule) -> Schedule:
    """The same lists with the F passes alone, as an evaluation runs them: no Reduce, no Step."""
    ranks = [only_forward(actions) for actions in schedule.actions]
    lists = whole_lists(ranks, schedule.owners, training=False)
    return Schedule(schedule.name, schedule.micro_batches, schedule.owners, lists)


def _ranks(name: str, stages: int, micro_batches: int, virtual_stages: int) -> _Ranks:
    fused = name.endswith("-fused")
    plain = name.removesuffix("-fused")
    if plain == "interleaved" and virtual_stages > 1:
        return interleaved(stages, micro_batches, virtual_stages, fused)
    if fused or plain == "interleaved":
        return one_f_one_b(stages, micro_batches, fused)
    return _ONE_CHUNK[name](stages, micro_batches)


def _check(name: str, stages: int, micro_batches: int, virtual_stages: int) -> None:
    if name not in VIRTUAL_STAGES:
        raise ConfigError(f"schedule {name!r}: is not a schedule; use one of {', '.join(NAMES)}")
    counts = {
        "stages": stages,
        "micro-batches": micro_batches,
        "virtual stages": virtual_stages,
    }
    for what, count in counts.items():
        if count < 1:
            raise ConfigError(f"schedule {name} with {count} {what}: give at least 1")
    takes = VIRTUAL_STAGES[name]
    if takes is not None and virtual_stages != takes:
        other = "" if name == "zb-v" else ", or use interleaved"
        raise ConfigError(
            f"schedule {name} with {virtual_stages} virtual stages: it takes {takes}; "
            f"give {takes}{other}"
        )
