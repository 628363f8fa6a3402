"""The groups that a rank is in, and the schedule that its pipeline runs."""

from __future__ import annotations

from collections.abc import Iterable

from megallama.config.schema import Config
from megallama.spec.grid import Grid, Place
from megallama.spec.schedules.actions import Schedule
from megallama.spec.schedules.build import make_schedule
from megallama.spec.stages import has_tied_copy, owners_of

#: The group of the embedding's rank and the head's, where they hold the same weight.
TIED = "tied"


def link_name(source: int, destination: int) -> str:
    """The name of the group in which a pipeline rank sends to another."""
    return f"pipeline {source}>{destination}"


def group_members(
    config: Config, place: Place, links: Iterable[tuple[int, int]]
) -> dict[str, tuple[int, ...]]:
    """The members of each of a rank's groups, in an order that all ranks share.

    To `Place.groups` come, of `links` (`Schedule.links`: pairs of pipeline ranks between which
    something is sent), `pipeline S>D` for each that this rank is an end of, with the source first;
    and `tied`, the embedding's rank and the head's, where they hold the same weight.
    """
    mine = place.along("pipeline")
    peers = place.grid.group("pipeline", place.rank)
    found = place.groups(config.model.kv_heads)
    for source, destination in sorted(links):
        if mine in (source, destination):
            found[link_name(source, destination)] = (peers[source], peers[destination])
    head = owners_of(config, place.grid)[-1]
    if has_tied_copy(config, place.grid) and mine in (0, head):
        found[TIED] = (peers[0], peers[head])
    return found


def run_schedule(config: Config, grid: Grid, micro_batches: int | None = None) -> Schedule:
    """The schedule of a run's step on a grid; `micro_batches`: those of a pipeline.

    Raises:
        ConfigError: the schedule does not take these numbers.
    """
    parallel, train = config.parallel, config.train
    if micro_batches is None:
        micro_batches = train.global_batch // (train.micro_batch * grid.data)
    return make_schedule(parallel.schedule, grid.pipeline, micro_batches, parallel.chunks_per_rank)
