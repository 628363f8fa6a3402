"""The rank grid: which rank stands where, and whom it shares a group with.

Ranks count along the tensor axis first, then context, data and pipeline (Megatron-LM's order), so
that the ranks that talk most are neighbours on one machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from megallama.config.schema import Config
from megallama.errors import ConfigError

Axis = Literal["tensor", "context", "data", "pipeline"]
AXES: tuple[Axis, ...] = ("tensor", "context", "data", "pipeline")  # the fastest first


@dataclass(frozen=True)
class Grid:
    """The sizes of the axes. The context axis has no code behind it yet and is 1."""

    tensor: int = 1
    data: int = 1
    pipeline: int = 1
    context: int = 1

    @property
    def size(self) -> int:
        return prod(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The size of each of AXES."""
        return (self.tensor, self.context, self.data, self.pipeline)

    def coordinates(self, rank: int) -> dict[Axis, int]:
        """Where a rank stands on each axis."""
        found = {}
        for axis, size in zip(AXES, self.sizes, strict=True):
            rank, found[axis] = divmod(rank, size)
        return found

    def rank(self, coordinates: dict[Axis, int]) -> int:
        """The rank at these coordinates."""
        rank = 0
        for axis, size in zip(reversed(AXES), reversed(self.sizes), strict=True):
            rank = rank * size + coordinates[axis]
        return rank

    def group(self, axis: Axis, rank: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` along one axis only, in that axis's order."""
        place = self.coordinates(rank)
        size = self.sizes[AXES.index(axis)]
        return tuple(self.rank(place | {axis: i}) for i in range(size))

    def __str__(self) -> str:
        """One line a rank."""
        lines = ["rank  pp  dp  tp"]
        for rank in range(self.size):
            c = self.coordinates(rank)
            lines.append(f"{rank:4}  {c['pipeline']:2}  {c['data']:2}  {c['tensor']:2}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Place:
    """A rank's place in a grid."""

    grid: Grid
    rank: int

    def along(self, axis: Axis) -> int:
        """This rank's index on an axis."""
        return self.grid.coordinates(self.rank)[axis]

    def groups(self, kv_heads: int) -> dict[str, tuple[int, ...]]:
        """The members of each of this rank's groups.

        `key_value` are the tensor ranks that hold the same key/value heads: more than one where
        there are fewer heads than ranks.
        """
        tensor = self.grid.group("tensor", self.rank)
        sharing = max(1, self.grid.tensor // kv_heads)
        first = self.along("tensor") // sharing * sharing
        return {
            "world": tuple(range(self.grid.size)),
            "tensor": tensor,
            "key_value": tensor[first : first + sharing],
            "data": self.grid.group("data", self.rank),
        }


ALONE = Place(Grid(), 0)


def make_grid(config: Config, processes: int) -> Grid:
    """The grid of a run with so many processes; `parallel.data` follows where it is null.

    Raises:
        ConfigError: the processes do not fill the grid, its data ranks do not divide the batch, or
            a rank that is to be recorded is not among them.
    """
    parallel, train = config.parallel, config.train
    model_ranks = parallel.tensor * parallel.pipeline
    data = parallel.data or max(1, processes // model_ranks)
    if model_ranks * data != processes:
        sizes = f"parallel.tensor={parallel.tensor}"
        sizes += f" x parallel.pipeline={parallel.pipeline}" if parallel.pipeline > 1 else ""
        sizes += f" x parallel.data={parallel.data}" if parallel.data else ""
        raise ConfigError(
            f"{sizes}: {processes} {'process does' if processes == 1 else 'processes do'} not "
            f"make this grid; start {model_ranks * data} (--nproc {model_ranks * data} on one "
            "machine), or change the grid"
        )
    unit = train.micro_batch * data
    if train.global_batch % unit:
        above = (train.global_batch // unit + 1) * unit
        raise ConfigError(
            f"train.global_batch={train.global_batch}: is not a multiple of train.micro_batch="
            f"{train.micro_batch} x {data} data ranks; {above} is"
        )
    last = max(train.profile.ranks or (0,)) if train.profile else 0
    if last >= processes:
        raise ConfigError(
            f"train.profile.ranks: there is no rank {last}; name some of 0 to {processes - 1}"
        )
    return Grid(tensor=parallel.tensor, data=data, pipeline=parallel.pipeline)
