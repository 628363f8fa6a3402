"""The best layouts of a run on a machine: those that fit, by the speed predicted for them."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from megallama.config import ConfigError
from megallama.config.schema import Config
from megallama.plan.bounds import least_bytes, least_seconds, roughly_least_seconds
from megallama.plan.hardware import Hardware
from megallama.plan.layouts import Layout, layouts
from megallama.plan.ledger import Stage, ledger, stage
from megallama.plan.predict import Prediction, predict
from megallama.spec.grid import make_grid
from megallama.spec.groups import run_schedule

#: Layouts that are ranked. Slower ones are found where they need less memory.
RANKED = 12
#: For its memory alone a layout is worth a row if its step takes at most so much longer than the
#: fastest one's, and it needs at most this share of what every faster one needs.
LONGER, LESS = 1.15, 0.9


@dataclass(frozen=True)
class Candidate:
    """A layout that fits: its predicted step, and the stage that needs the most memory."""

    layout: Layout
    prediction: Prediction
    stage: Stage


@dataclass(frozen=True)
class Found:
    """`ranked`: layouts that fit, the fastest first: RANKED of them, and the slower ones of the
    front. `tried`: how many there are; `priced`: of how many a step had to be predicted to know."""

    ranked: tuple[Candidate, ...]
    tried: int
    priced: int

    @property
    def best(self) -> Candidate:
        return self.ranked[0]

    @cached_property
    def front(self) -> tuple[Candidate, ...]:
        """Those that need less memory than every faster one."""
        found: list[Candidate] = []
        for one in self.ranked:
            if not found or one.stage.needed < found[-1].stage.needed:
                found.append(one)
        return tuple(found)


@dataclass(frozen=True)
class _Open:
    """A layout of which a step is known to take at least `seconds`, and `prediction` if just so."""

    layout: Layout
    seconds: float
    close: bool = False
    prediction: Prediction | None = None


def search(config: Config, hardware: Hardware, devices: int, fixed: Collection[str] = ()) -> Found:
    """The layouts of a run on so many devices; keys in `fixed` keep their values.

    Best first: of all layouts the one with the lowest bound is looked at more closely, until it is
    predicted and still the lowest. So every layout is ranked where a prediction of all would put
    it, and most are never predicted.

    Raises:
        ConfigError: no layout is possible, or none fits.
    """
    every = list(layouts(config, devices, hardware.ranks, fixed))
    if not every:
        raise ConfigError(
            f"{_devices(devices)}: no layout divides this run among them; try another number, "
            "another train.global_batch, or leave keys of parallel to the search"
        )
    search = _Search(hardware, devices)
    ranked = tuple(search.best_first(every))
    if not ranked:
        raise ConfigError(
            f"{_devices(devices)} of {hardware.memory.capacity / 2**30:.1f} GiB: none of "
            f"{len(every)} layouts fits; use more devices, or leave keys to the search"
        )
    return Found(ranked, len(every), search.priced)


class _Search:
    def __init__(self, hardware: Hardware, devices: int) -> None:
        self.hardware, self.devices = hardware, devices
        self.priced = self.count = 0
        self.smallest = hardware.memory.capacity
        self.slowest = float("inf")

    def best_first(self, every: list[Layout]) -> Iterator[Candidate]:
        first = [_Open(one, roughly_least_seconds(one, self.hardware)) for one in every]
        queue = [(one.seconds, index, one) for index, one in enumerate(first)]
        heapq.heapify(queue)
        while queue:
            seconds, index, one = heapq.heappop(queue)
            if seconds > self.slowest:
                return
            if one.prediction is None:
                if self._can_matter(one.layout):
                    closer = self._closer(one)
                    heapq.heappush(queue, (closer.seconds, index, closer))
            elif found := self._fitting(one.layout, one.prediction):
                yield found

    @property
    def _room(self) -> float:
        """Bytes with which a layout that is slower than all so far is still ranked."""
        capacity = self.hardware.memory.capacity
        return capacity if self.count < RANKED else LESS * self.smallest

    def _can_matter(self, layout: Layout) -> bool:
        """Whether it is ranked by the bound of its memory."""
        return least_bytes(layout).bytes <= self._room

    def _closer(self, one: _Open) -> _Open:
        if not one.close:
            seconds = max(one.seconds, least_seconds(one.layout, self.hardware))
            return replace(one, seconds=seconds, close=True)
        self.priced += 1
        prediction = predict(one.layout.config, self.hardware, self.devices)
        return replace(one, seconds=prediction.step_seconds, prediction=prediction)

    def _fitting(self, layout: Layout, prediction: Prediction) -> Candidate | None:
        """The next in order of speed, if it fits and is ranked."""
        least = least_bytes(layout)
        if least.bytes > self._room:
            return None
        grid = make_grid(layout.config, self.devices)
        schedule = run_schedule(layout.config, grid)
        one = stage(layout.config, grid, self.hardware, least.rank, schedule)
        if one.needed > self._room:  # spares the other stages
            return None
        largest = ledger(layout.config, grid, self.hardware, schedule).largest
        if largest.needed > self._room:
            return None
        self.count, self.smallest = self.count + 1, min(self.smallest, largest.needed)
        if self.count == 1:
            self.slowest = LONGER * prediction.step_seconds
        return Candidate(layout, prediction, largest)


def _devices(count: int) -> str:
    return f"{count} device{'s' if count > 1 else ''}"
