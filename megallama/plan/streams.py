"""The time of what a rank issues, on two streams: compute and communication."""

from __future__ import annotations

from collections import deque
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
    the compute stream until what it waits for is done. While a kernel runs beside a collective,
    each is slower by the machine's `contention`. `laps`: takes each step's time.
    """
    return _Streams(costs, laps).run(issued)


class _Streams:
    def __init__(self, costs: Costs, laps: list[Lap] | None) -> None:
        self.costs, self.laps = costs, laps
        contention = costs.hardware.contention
        self.slower, self.collective_slower = 1.0 + contention.compute, 1.0 + contention.collective
        self.now = 0.0
        self.compute = 0.0
        #: Collectives in flight and those that queue behind the first; its seconds to go, alone.
        self.flights: deque[Start] = deque()
        self.left = 0.0
        self.began = 0.0

    def run(self, issued: Sequence[Issued]) -> Timing:
        for step in issued:
            if isinstance(step, Wait):
                while any(each in self.flights for each in step.started):
                    self._idle()  # one that was begun in an action before is done
            elif isinstance(step, Start):
                self.flights.append(step)
                if len(self.flights) == 1:
                    self._take_off()
            else:
                begin, seconds = self.now, self.costs.compute(step)
                self._compute(seconds)
                self.compute += seconds
                self._note("compute", step.name, begin)
        while self.flights:
            self._idle()
        return Timing(self.now, self.compute)

    def _compute(self, seconds: float) -> None:
        """A kernel, beside what is in flight."""
        while self.flights:
            lands = self.left * self.collective_slower
            if seconds * self.slower < lands:
                self.now += seconds * self.slower
                self.left -= seconds * self.slower / self.collective_slower
                return
            self.now += lands
            seconds -= lands / self.slower
            self._land()
        self.now += seconds

    def _idle(self) -> None:
        """Nothing is computed until the first collective lands."""
        self.now += self.left
        self._land()

    def _land(self) -> None:
        collective = self.flights.popleft().collective
        self._note(collective.group, collective.operation, self.began)
        if self.flights:
            self._take_off()

    def _take_off(self) -> None:
        self.began, self.left = self.now, self.costs.collective(self.flights[0].collective)

    def _note(self, stream: str, name: str, begin: float) -> None:
        if self.laps is not None:
            self.laps.append(Lap(stream, name, begin, self.now))
