"""What a rank's list promises to hold, read from its order alone.

The passes of a rank run one after the other, so the order says what is alive at the same time,
whatever the passes take. A set is what one chunk keeps of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from megallama.spec.schedules.actions import Action, Compute, Fused, passes


def peak_in_flight(actions: Sequence[Action]) -> int:
    """The most saved sets alive at once: from the start of F to the end of B or BW.

    In a fused action both are alive: the set that the forward fills and the one that the backward
    uses. In a list without backwards nothing is ever freed, so it counts the forwards.
    """
    alive = peak = 0
    for action in actions:
        kinds = _kinds(action)
        alive += "F" in kinds
        peak = max(peak, alive)
        alive -= "B" in kinds or "BW" in kinds
    return peak


def peak_weight_states(actions: Sequence[Action]) -> int:
    """The most weight states alive at once: from the start of a B to the end of its W.

    A BW hands nothing on, so it has none.
    """
    alive = peak = 0
    for action in actions:
        kinds = _kinds(action)
        alive += "B" in kinds
        peak = max(peak, alive)
        alive -= "W" in kinds
    return peak


def _kinds(action: Action) -> tuple[str, ...]:
    if isinstance(action, Compute | Fused):
        return tuple(one.kind for one in passes((action,)))
    return ()
