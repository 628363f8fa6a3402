"""The time of what a rank issues, on two streams: compute and communication."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megallama.plan.costs import Costs
from megallama.plan.ops import Issued, Start, Wait


@dataclass(frozen=True)
class Timing:
    """`seconds` from begin to end; `compute` of them are kernels as they would take alone."""

    seconds: float
    compute: float

    def __add__(self, other: Timing) -> Timing:
        return Timing(self.seconds + other.seconds, self.compute + other.compute)

    def __rmul__(self, times: float) -> Timing:
        return Timing(times * self.seconds, times * self.compute)


@dataclass(frozen=True)
class Lap:
    """One step's time on its stream: "compute" or a group's name."""

    stream: str
    name: str
    start: float
    end: float


def run(issued: Sequence[Issued], costs: Costs, laps: list[Lap] | None = None) -> Timing:
    """Issue the steps in their order.

    A collective begins when those before it are done and the kernels issued before it; a wait holds
    the compute stream until what it waits for is done. A kernel is slower by the machine's
    `contention` while a collective is in flight. `laps`: takes each step's time.
    """
    return _Streams(costs, laps).run(issued)


class _Streams:
    def __init__(self, costs: Costs, laps: list[Lap] | None) -> None:
        self.costs, self.laps = costs, laps
        self.slower = 1.0 + costs.hardware.contention
        self.now = 0.0
        self.compute = 0.0
        #: When each collective is done, and all of them; (start, end) of those that may still run.
        self.ends: dict[Start, float] = {}
        self.free = 0.0
        self.flights: list[tuple[float, float]] = []

    def run(self, issued: Sequence[Issued]) -> Timing:
        for step in issued:
            if isinstance(step, Wait):
                for each in step.started:  # begun in an action before: done
                    self.now = max(self.now, self.ends.get(each, 0.0))
            elif isinstance(step, Start):
                self._start(step)
            else:
                seconds = self.costs.compute(step)
                begin, self.now = self.now, self._through(seconds)
                self.compute += seconds
                if self.laps is not None:
                    self.laps.append(Lap("compute", step.name, begin, self.now))
        return Timing(max(self.now, self.free), self.compute)

    def _start(self, step: Start) -> None:
        begin = max(self.now, self.free)
        self.free = self.ends[step] = begin + self.costs.collective(step.collective)
        self.flights.append((begin, self.free))
        if self.laps is not None:
            collective = step.collective
            self.laps.append(Lap(collective.group, collective.operation, begin, self.free))

    def _through(self, seconds: float) -> float:
        """When a kernel that begins now is done."""
        now, flights = self.now, self.flights
        while flights:
            begin, end = flights[0]
            if end <= now:
                flights.pop(0)
                continue
            if begin > now:  # until the next one takes off
                if now + seconds <= begin:
                    break
                seconds -= begin - now
                now = begin
            if now + seconds * self.slower <= end:
                return now + seconds * self.slower
            seconds -= (end - now) / self.slower
            now = end
        return now + seconds
