"""Schedules without a split of the backward: GPipe, 1F1B, interleaved 1F1B, and fused forms.

Each function returns the order of every rank's passes; `messages.py` adds the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from megallama.spec.schedules.actions import Compute, Fused
from megallama.spec.schedules.messages import Slot


def gpipe(stages: int, micro_batches: int) -> list[list[Slot]]:
    """All forwards, then all backwards (Huang et al., arXiv 1811.06965).

    The backwards go in ascending order as in every schedule: the sum of a weight's gradient then
    has one order of additions, and all schedules give the same bits.
    """
    return [
        [Compute(kind, rank, i) for kind in ("F", "BW") for i in range(micro_batches)]
        for rank in range(stages)
    ]


def one_f_one_b(stages: int, micro_batches: int, fused: bool = False) -> list[list[Slot]]:
    """1F1B (PipeDream-flush; Narayanan et al., arXiv 2104.04473, figure 4).

    Warm-up of rank r: p-r-1 forwards. In the fused form the pair F(i), BW(j) begins when both have
    what they need, and rank r+1 can only have made the gradient of j after it was given as many
    more forwards: one for the forward that rides along with each backward below. Hence 2(p-r)-1.
    """
    ranks = []
    for rank in range(stages):
        warm_up = 2 * (stages - rank) - 1 if fused else stages - rank - 1
        forwards = [Compute("F", rank, i) for i in range(micro_batches)]
        backwards = [Compute("BW", rank, i) for i in range(micro_batches)]
        ranks.append(_in_pairs(forwards, backwards, warm_up, fused))
    return ranks


def interleaved(
    stages: int, micro_batches: int, virtual_stages: int, fused: bool = False
) -> list[list[Slot]]:
    """Interleaved 1F1B (Narayanan et al., arXiv 2104.04473, §2.2), for more than one chunk a rank.

    Micro-batches go in groups of p; a group passes through all chunks of a rank before the next
    one does, the backward through the chunks in descending order. Warm-up of rank r: 2(p-r-1) +
    (v-1)p passes, in the fused form one more.

    Where p does not divide the micro-batches, the lists are those of the next multiple without the
    passes of micro-batches that are not there. That deadlocks nowhere: passes wait for passes of
    their own micro-batch and for those before them in their list, so what is left waits for less.
    """
    whole = -(-micro_batches // stages) * stages
    ranks = []
    for rank in range(stages):
        order = [
            (chunk, i)
            for first in range(0, whole, stages)
            for chunk in range(virtual_stages)
            for i in range(first, first + stages)
        ]
        forwards = [Compute("F", chunk * stages + rank, i) for chunk, i in order]
        backwards = [
            Compute("BW", (virtual_stages - 1 - chunk) * stages + rank, i) for chunk, i in order
        ]
        warm_up = 2 * (stages - rank - 1) + (virtual_stages - 1) * stages + fused
        ranks.append(without(_in_pairs(forwards, backwards, warm_up, fused), micro_batches))
    return ranks


def without(actions: Sequence[Slot], micro_batches: int) -> list[Slot]:
    """The list without the passes of micro-batches from `micro_batches` on."""
    found: list[Slot] = []
    for action in actions:
        if isinstance(action, Fused):
            both = (action.forward, action.backward)
            kept = [one for one in both if one.micro_batch < micro_batches]
            found += [action] if len(kept) == 2 else kept
        elif action.micro_batch < micro_batches:
            found.append(action)
    return found


def _in_pairs(
    forwards: Sequence[Compute], backwards: Sequence[Compute], warm_up: int, fused: bool
) -> list[Slot]:
    """Some forwards, then a forward and a backward by turns, then the backwards that are left."""
    warm_up = min(warm_up, len(forwards))
    pairs = list(zip(forwards[warm_up:], backwards, strict=False))
    steady: list[Slot] = (
        [Fused(forward, backward) for forward, backward in pairs]
        if fused
        else list(chain.from_iterable(pairs))
    )
    return [*forwards[:warm_up], *steady, *backwards[len(pairs) :]]
