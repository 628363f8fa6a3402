"""Does the run fit this machine? Asked before it starts, and answered when it turns out not to.

What a rank holds is computed (`spec.memory`); what there is, is read from the device.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megallama.config.schema import Config
from megallama.errors import ConfigError
from megallama.spec.grid import Grid, Place, make_grid
from megallama.spec.groups import run_schedule
from megallama.spec.memory import held_bytes, rank_bytes
from megallama.spec.savings import cheapest
from megallama.spec.workspaces import Device
from megallama.train.device import choose_device, peak_memory_bytes
from megallama.train.failures import explained_loss, is_shortage
from megallama.train.process import Process

#: Share of the ledger's sum that a run may turn out not to need: measured, it is at most 5% above
#: (fused schedules), so that what would just fit is never refused.
SLACK = 0.06
MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class Room:
    """The memory of a device, and those ranks of the job that share it."""

    device: torch.device
    size: int
    ranks: tuple[int, ...]
    threads: int = 1
    """Of each rank, on a CPU."""

    @property
    def kind(self) -> Device:
        """As the ledger asks for it."""
        return Device(self.device.type, self.threads)

    def __str__(self) -> str:
        return _text(self.size) + ("" if self.device.type == "cuda" else " free")


def ledger_lines(sizes: Mapping[str, int]) -> list[str]:
    """A line an item, and their sum."""
    items = {**sizes, "sum": sum(sizes.values())}
    return [f"{name}: {size / MIB:,.1f} MiB" for name, size in items.items()]


def find_room(device: torch.device, process: Process) -> Room | None:
    """The memory that this process has a share of; None where the system does not say.

    A CPU's is shared by the ranks of the node, which are taken to be numbered in a row.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return Room(device, total, (process.rank,))
    free = free_memory()
    if free is None:
        return None
    first = process.rank - process.local_rank
    ranks = tuple(range(first, first + process.local_size))
    return Room(device, free, ranks, torch.get_num_threads())


def free_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this machine, or the control group of this process, has left, swap included.

    None where the system is no Linux.
    """
    try:
        lines = (line.split() for line in (proc / "meminfo").read_text().splitlines())
        free = {words[0]: int(words[1]) * 1024 for words in lines}
        room = free["MemAvailable:"] + free.get("SwapFree:", 0)
        own = (proc / "self/cgroup").read_text().splitlines()
    except (OSError, KeyError):
        return None
    return min([room, *_group_rooms(own, groups)])


def _group_rooms(own: list[str], groups: Path) -> Iterator[int]:
    """What each control group above this process has left; caches count as left."""
    for line in own:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, limit, used, prefix = groups, "memory.max", "memory.current", ""
        elif controllers == "memory":
            folder, prefix = groups / "memory", "total_"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        place = folder / path.lstrip("/")
        for group in (place, *place.parents):
            if not group.is_relative_to(folder):
                break
            try:
                most, now = (int((group / name).read_text()) for name in (limit, used))
                stat = dict(x.split() for x in (group / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # not mounted here, or "max"
                continue
            caches = (stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
            yield most - now + sum(map(int, caches))


def needed(config: Config, grid: Grid, room: Room) -> int:
    """Bytes that the ranks hold that share the room; on CUDA those of the largest rank."""
    if room.device.type == "cuda":
        return sum(held_bytes(config, grid, room.kind).values())
    lists = run_schedule(config, grid).actions
    places = [Place(grid, rank) for rank in room.ranks]
    stages = [place.along("pipeline") for place in places]
    by_stage = dict(zip(stages, places, strict=True))
    sizes = {
        stage: sum(rank_bytes(config, place, lists[stage], room.kind).values())
        for stage, place in by_stage.items()
    }
    return sum(sizes[stage] for stage in stages)


def refuse_too_large(config: Config, process: Process) -> str:
    """Refuse a run that cannot fit: the verdict, empty where the system names no memory."""
    room = find_room(choose_device(config, process.local_rank), process)
    return verdict(config, make_grid(config, process.size), room) if room else ""


def verdict(config: Config, grid: Grid, room: Room) -> str:
    """One line that says that the run fits.

    Raises:
        ConfigError: by the ledger less `SLACK` it does not; with the largest item and the cheapest
            change that would fit, and below that the ledger of the rank that holds the most.
    """
    need = needed(config, grid, room)
    what = f"the run would hold {_text(need)}"
    if len(room.ranks) > 1:
        what = f"the {len(room.ranks)} ranks of this machine would hold {_text(need)}"
    what = f"{what}, {room.device} has {room}"
    if need * (1 - SLACK) > room.size:
        raise ConfigError(f"{what}; {_advice(config, grid, room, room.size)}")
    return f"it fits: {what}"


@contextmanager
def explained_shortage(config: Config, process: Process) -> Iterator[None]:
    """Running out of memory within is an error that says what to change.

    Raises:
        ConfigError: an allocation failed.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        traceback.clear_frames(error.__traceback__)  # what they hold is needed for the answer
        raise ConfigError(_shortage(config, process, error)) from error


@contextmanager
def explained(config: Config, process: Process) -> Iterator[None]:
    """What PyTorch raises within because of a device or a connection is one line that says what to
    do: `explained_shortage` and `explained_loss`."""
    with explained_shortage(config, process), explained_loss(process):
        yield


def _shortage(config: Config, process: Process, error: BaseException) -> str:
    grid = make_grid(config, process.size)
    device = choose_device(config, process.local_rank)
    room = find_room(device, process) or Room(device, 0, (process.rank,))
    need = needed(config, grid, room)
    asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    for_what = f" for {asked[1]} more" if asked else ""
    what = f"rank {process.rank}: {device} has no memory left{for_what}, where this process held "
    what += f"{_text(peak_memory_bytes(device))}; by the ledger the run holds {_text(need)}"
    # The ledger and the room were wrong about each other: ask for a change that is felt.
    return f"{what}; {_advice(config, grid, room, int(need * (1 - 2 * SLACK)))}"


def _advice(config: Config, grid: Grid, room: Room, size: int) -> str:
    """The largest item and the cheapest change to `size` bytes; below, the whole ledger."""
    sizes = held_bytes(config, grid, room.kind)
    name = max(sizes, key=lambda item: sizes[item])
    share = len(room.ranks)
    found = cheapest(config, grid, room.kind, lambda held: held * share * (1 - SLACK) <= size)
    way_out = "no saved_activations, micro_batch or more ranks would do: choose a smaller model"
    if found is not None:
        change, held = found
        way_out = f"with {change.text} it would be {_text(held * share)}"
        if change.grid.size > grid.size:
            kind = "GPUs" if room.device.type == "cuda" else f"ranks, {share} a machine"
            way_out += f", on {change.grid.size} {kind}"
    return "\n".join(
        [f"most of it is {name}, {_text(sizes[name])}; {way_out}", *ledger_lines(sizes)]
    )


def _text(size: int) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / MIB:,.1f} MiB"
