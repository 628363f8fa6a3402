"""The memory of every pipeline stage beside what the machine has: fits or not, and the way out.

The items are `spec.memory`'s, exact to the byte for what an allocator is asked for. What it loses
and what libraries take is not in them, so both are lines of their own, and assumed: none of this
was run on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megallama.config.schema import Config
from megallama.plan.hardware import Hardware
from megallama.spec.grid import Grid, Place
from megallama.spec.groups import run_schedule
from megallama.spec.memory import rank_bytes
from megallama.spec.savings import Change, cheapest
from megallama.spec.schedules.actions import Schedule
from megallama.spec.stages import Chunk, chunks_of, owners_of
from megallama.spec.workspaces import Device

#: Items that are made once and stay; the others come and go, which is what leaves holes between
#: blocks.
LASTING = frozenset(
    {"weights", "masters", "gradients", "moments", "kept for early_step", "rotations", "logits"}
)
#: Of the bytes that come and go, what the allocator rounds up and cannot use again. Assumed.
FRAGMENTED = 0.05
#: Of a GPU: the context, libraries' workspaces and the channels of NCCL's groups. Of a CPU: an
#: interpreter with PyTorch. Assumed.
LIBRARIES: Mapping[str, int] = MappingProxyType({"cuda": 2 << 30, "cpu": 1 << 28})


@dataclass(frozen=True)
class Stage:
    """What the ranks of one pipeline stage hold at their worst moment, in bytes by item.

    `slack`: what the allocator is assumed to lose; `libraries`: what is assumed to be taken before
    the first tensor.
    """

    rank: int
    chunks: tuple[Chunk, ...]
    items: Mapping[str, int]
    slack: int
    libraries: int

    @property
    def held(self) -> int:
        """The sum of the items."""
        return sum(self.items.values())

    @property
    def needed(self) -> int:
        """What the device must have."""
        return self.held + self.slack + self.libraries

    @property
    def layers(self) -> int:
        return sum(len(chunk.layers) for chunk in self.chunks)


@dataclass(frozen=True)
class Ledger:
    """All stages, and the bytes that a device has."""

    stages: tuple[Stage, ...]
    capacity: int

    @property
    def largest(self) -> Stage:
        """The stage whose ranks need the most."""
        return max(self.stages, key=lambda stage: stage.needed)

    @property
    def fits(self) -> bool:
        return self.largest.needed <= self.capacity


def ledger(
    config: Config, grid: Grid, hardware: Hardware, schedule: Schedule | None = None
) -> Ledger:
    """The memory of a run on a grid of such devices; `schedule`: the run's, where it is at hand."""
    made = schedule or run_schedule(config, grid)
    stages = (stage(config, grid, hardware, rank, made) for rank in range(grid.pipeline))
    return Ledger(tuple(stages), hardware.memory.capacity)


def stage(config: Config, grid: Grid, hardware: Hardware, rank: int, schedule: Schedule) -> Stage:
    """One pipeline rank's."""
    device, actions = device_of(hardware), schedule.actions[rank]
    items = rank_bytes(config, Place(grid, grid.group("pipeline", 0)[rank]), actions, device)
    chunks = zip(chunks_of(config, grid), owners_of(config, grid), strict=True)
    own = tuple(chunk for chunk, owner in chunks if owner == rank)
    return Stage(rank, own, items, slack_of(items), LIBRARIES[device.type])


def slack_of(items: Mapping[str, int]) -> int:
    """What the allocator is assumed to lose."""
    return round(FRAGMENTED * sum(size for name, size in items.items() if name not in LASTING))


def device_of(hardware: Hardware) -> Device:
    """The device as the ledger of `spec` asks for it; a CPU's rank has one thread."""
    return Device(hardware.device)


def way_out(config: Config, grid: Grid, hardware: Hardware) -> tuple[Change, int] | None:
    """The cheapest change that fits, and the bytes that its largest rank then holds.

    All of those bytes count as if they came and went: the ledger's ask is of a sum alone.
    """
    device = device_of(hardware)
    room = hardware.memory.capacity - LIBRARIES[device.type]
    return cheapest(config, grid, device, lambda held: held * (1 + FRAGMENTED) <= room)
