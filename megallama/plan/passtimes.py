"""Seconds of every kind of pass of a chunk: its steps, issued by the driver, on two streams."""

from __future__ import annotations

from functools import lru_cache

from megallama.plan.chunk import ChunkPasses, Part
from megallama.plan.costs import Costs
from megallama.plan.driver import Beside, WgradQueue, both, drive
from megallama.plan.hardware import Hardware
from megallama.plan.ops import Issued
from megallama.plan.shape import Shape
from megallama.plan.streams import Lap, Timing, run

#: Layers from which on each further one takes as long as the one before.
STEADY = 3


def issued(shape: Shape, kind: str, first: Part, second: Part) -> list[Issued]:
    """What a rank issues in a pass. `kind`: F, BW, B or W of `first`; FB, the forward of `first`
    beside the backward of `second`; "B+", the B of `first` with the W of `second` in its waits, and
    "W-", what is left of that W."""
    passes, others = ChunkPasses(shape, first), ChunkPasses(shape, second)
    queue = WgradQueue(overlap=not shape.blocks)
    if kind == "F":
        return drive(passes.forward())
    if kind == "BW":
        return drive(passes.backward(joined=True), queue)
    if kind == "B":
        return drive(passes.backward(joined=False))
    if kind == "W":
        return drive(passes.backward_weights())
    if kind == "FB":
        return drive(both(passes.forward(), others.backward(joined=True)), queue)
    weights = Beside(others.backward_weights())
    steps = drive(passes.backward(joined=False), weights)
    return steps if kind == "B+" else weights.finish()


class PassTimes:
    """Timings of passes on a machine, each worked out once."""

    def __init__(self, hardware: Hardware, precision: str) -> None:
        self.costs = Costs(hardware, precision)
        self._known: dict[tuple[Shape, str, Part, Part], Timing] = {}

    def timing(self, shape: Shape, kind: str, first: Part, second: Part) -> Timing:
        """Of a pass; beyond `STEADY` layers each takes as long as the one before."""
        key = shape, kind, first, second
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._extended(*key)
        return found

    def laps(self, shape: Shape, kind: str, first: Part, second: Part) -> list[Lap]:
        """Every step's time, of all layers."""
        laps: list[Lap] = []
        run(issued(shape, kind, first, second), self.costs, laps)
        return laps

    def _extended(self, shape: Shape, kind: str, first: Part, second: Part) -> Timing:
        more = min(first.layers, second.layers) - STEADY
        if more <= 1:
            return run(issued(shape, kind, first, second), self.costs)
        few, one_more = (
            self.timing(shape, kind, _less(first, more - k), _less(second, more - k))
            for k in (0, 1)
        )
        return few + float(more) * (one_more + -1.0 * few)


def _less(part: Part, layers: int) -> Part:
    return Part(part.layers - layers, part.embedding, part.head)


@lru_cache(maxsize=16)
def pass_times(hardware: Hardware, precision: str) -> PassTimes:
    """Shared by all predictions for a machine."""
    return PassTimes(hardware, precision)
