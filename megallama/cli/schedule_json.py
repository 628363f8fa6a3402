"""A simulated schedule as figures that a script reads, and its passes one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megallama.spec.schedules.actions import Compute, Fused
from megallama.spec.schedules.simulate import Simulation, Timed

#: What F, B and W take, of a rank's whole share of a micro-batch.
Times = tuple[float, float, float]


def spans(timed: Timed, times: Times) -> Iterator[tuple[Compute, float, float]]:
    """The passes of an action with their starts and ends; those of a fused one, which run together,
    one after the other, each with its share."""
    if not isinstance(timed.action, Fused):
        yield timed.action, timed.start, timed.end
        return
    forward, backward, weight = times
    share = forward / (forward + backward + weight)
    between = timed.start + share * (timed.end - timed.start)
    yield timed.action.forward, timed.start, between
    yield timed.action.backward, between, timed.end


def figures(simulation: Simulation, times: Times) -> dict[str, Any]:
    """What --json writes."""
    schedule = simulation.schedule
    forward, backward, weight = times
    return {
        "name": schedule.name,
        "stages": schedule.stages,
        "micro_batches": schedule.micro_batches,
        "virtual_stages": schedule.chunks // schedule.stages,
        "forward": forward,
        "backward": backward,
        "weight": weight,
        "makespan": simulation.makespan,
        "bubble_fraction": simulation.bubble_fraction,
        "peak_in_flight": list(simulation.peak_in_flight),
        "peak_weight_states": list(simulation.peak_weight_states),
        "activation_memory": list(simulation.activation_memory),
        "actions": [
            [
                {
                    "kind": one.kind,
                    "chunk": one.chunk,
                    "micro_batch": one.micro_batch,
                    "start": start,
                    "end": end,
                    "fused": isinstance(each.action, Fused),
                }
                for each in timed
                for one, start, end in spans(each, times)
            ]
            for timed in simulation.ranks
        ],
    }
