"""Zero-bubble schedules: the weight gradients fill what would be waiting.

Qi et al., "Zero Bubble Pipeline Parallelism", arXiv 2401.10241, and "Pipeline Parallelism with
Controllable Memory", arXiv 2405.15362. Each function returns the order of every rank's passes, B
and W apart everywhere; `joined` puts together what gains nothing by that.
"""

from __future__ import annotations

from collections.abc import Sequence

from megallama.spec.schedules.actions import Compute
from megallama.spec.schedules.messages import Slot, made_by
from megallama.spec.schedules.plain import without


def zb_h1(stages: int, micro_batches: int) -> list[list[Slot]]:
    """ZB-H1 (arXiv 2401.10241, §2.1): 1F1B's memory, a third of its bubble in unit times.

    Rank r begins with p-r forwards and runs W r micro-batches behind B.
    """
    return [_h(rank, micro_batches, stages - rank, rank) for rank in range(stages)]


def zb_h2(stages: int, micro_batches: int) -> list[list[Slot]]:
    """ZB-H2 (arXiv 2401.10241, §2.2): no bubble in unit times, about twice 1F1B's memory.

    Rank r begins with 2(p-r)-1 forwards and runs W 2r micro-batches behind B.
    """
    return [_h(rank, micro_batches, 2 * (stages - rank) - 1, 2 * rank) for rank in range(stages)]


def _h(rank: int, micro_batches: int, warm_up: int, delay: int) -> list[Slot]:
    """Forwards first, then B(j), W(j - delay) and a forward by turns, then the W that are left."""
    warm_up = min(warm_up, micro_batches)
    found: list[Slot] = [Compute("F", rank, i) for i in range(warm_up)]
    for j in range(micro_batches):
        found.append(Compute("B", rank, j))
        if j >= delay:
            found.append(Compute("W", rank, j - delay))
        if warm_up + j < micro_batches:
            found.append(Compute("F", rank, warm_up + j))
    left = range(max(0, micro_batches - delay), micro_batches)
    return found + [Compute("W", rank, j) for j in left]


def zb_v(stages: int, micro_batches: int) -> list[list[Slot]]:
    """ZB-V (arXiv 2401.10241, §6): no bubble where F = B = W, in 1F1B's memory.

    Rank r has chunk r of the way down the ranks and chunk 2p-1-r of the way back, so the last
    rank's second chunk follows its first at once, and rank 0 has the head. The phases are laid out
    for at least 2p-1 micro-batches; with fewer, the passes of the missing ones are left out, which
    deadlocks nowhere (`interleaved` says why).
    """
    whole = max(micro_batches, 2 * stages - 1)
    return [without(_v(rank, stages, whole), micro_batches) for rank in range(stages)]


def _v(rank: int, stages: int, micro_batches: int) -> list[Slot]:
    """The phases of one rank, for 2p-1 micro-batches or more.

    A unit of time is a chunk's pass. The head's first backward can begin after 2p forwards of
    micro-batch 0, so rank r has 2p-1-r - r = 2(p-r)-1 free units before its second chunk's first
    forward, then pairs of forwards until that chunk's first gradient is there. From then on each
    round has one pass of each of the six kinds, which is all its rank ever has to do: no bubble.
    """
    down, back = rank, 2 * stages - 1 - rank
    done = {(kind, chunk): 0 for kind in "FBW" for chunk in (down, back)}
    found: list[Slot] = []

    def add(*kinds: tuple[str, int]) -> None:
        for kind, chunk in kinds:
            index = done[kind, chunk]
            done[kind, chunk] += 1
            found.append(Compute(kind, chunk, index))  # type: ignore[arg-type]

    for _ in range(2 * (stages - rank) - 1):
        add(("F", down))
    for _ in range(rank):
        add(("F", back), ("F", down))
    for _ in range(stages - rank):
        add(("F", back), ("B", back), ("W", back))
    while done["F", back] < micro_batches:
        if done["F", down] < micro_batches:
            add(("F", down))
        add(("B", down), ("W", down), ("F", back), ("B", back), ("W", back))
    for _ in range(rank):
        add(("B", down), ("B", back))
    for _ in range(stages - rank):
        add(("B", down), ("W", down))
    for chunk in (back, down):
        for _ in range(micro_batches - done["W", chunk]):
            add(("W", chunk))
    return found


def joined(actions: Sequence[Slot], owners: Sequence[int]) -> list[Slot]:
    """B and W as one BW where they stand together and B's gradient goes to no other rank.

    Anywhere else B alone lets the gradient leave earlier, by W's whole time.
    """
    found: list[Slot] = []
    for action in actions:
        before = found[-1] if found else None
        if (
            isinstance(action, Compute)
            and isinstance(before, Compute)
            and (before.kind, action.kind) == ("B", "W")
            and (before.chunk, before.micro_batch) == (action.chunk, action.micro_batch)
            and made_by(before, owners) is None
        ):
            found[-1] = Compute("BW", action.chunk, action.micro_batch)
        else:
            found.append(action)
    return found
