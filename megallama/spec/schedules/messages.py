"""From the order of a rank's passes to its whole list: what is sent, received and reduced when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Literal

from megallama.spec.schedules.actions import (
    Action,
    Compute,
    Fused,
    Message,
    Receive,
    Reduce,
    Send,
    Step,
    passes,
)

#: What a rank computes at one time.
Slot = Compute | Fused


def halves(action: Slot) -> tuple[Compute, ...]:
    """The passes of an action: both of a fused one."""
    return (action.forward, action.backward) if isinstance(action, Fused) else (action,)


def taken_by(one: Compute, owners: Sequence[int]) -> Message | None:
    """What a pass needs from another rank: None where its maker is on the same rank, or is none.

    The first chunk takes no activations, the last chunk's backward no gradient, a W nothing.
    """
    if one.kind == "W":
        return None
    maker = one.chunk - 1 if one.kind == "F" else one.chunk + 1
    if not 0 <= maker < len(owners) or owners[maker] == owners[one.chunk]:
        return None
    return Message(_what(one), one.chunk, one.micro_batch, owners[maker])


def made_by(one: Compute, owners: Sequence[int]) -> Send | None:
    """What goes out after a pass: None where the chunk that takes it is on the same rank."""
    if one.kind == "W":
        return None
    taker = one.chunk + 1 if one.kind == "F" else one.chunk - 1
    if not 0 <= taker < len(owners) or owners[taker] == owners[one.chunk]:
        return None
    return Send(_what(one), taker, one.micro_batch, owners[taker])


def _what(one: Compute) -> Literal["activations", "gradient"]:
    return "activations" if one.kind == "F" else "gradient"


def whole_lists(
    ranks: Sequence[Sequence[Slot]], owners: Sequence[int], training: bool = True
) -> tuple[tuple[Action, ...], ...]:
    """Adds to each rank's passes its Send, Receive and, in `training`, Reduce and Step actions.

    A Send comes directly after the pass that makes it, a Reduce after the chunk's last W or BW. A
    Receive is posted one pass before the pass that needs it, so that the transfer runs under that
    one, or earlier where the pair's order asks for it.
    """
    sends = [
        [[send for one in halves(action) if (send := made_by(one, owners))] for action in actions]
        for actions in ranks
    ]
    sent = _by_peer(sends)
    lists = []
    for rank, actions in enumerate(ranks):
        posted = _receives(rank, actions, owners, sent)
        last = _last_of_chunks(actions) if training else {}
        found: list[Action] = []
        for index, action in enumerate(actions):
            found += posted.get(index, ())
            found.append(action)
            found += sends[rank][index]
            found += [Reduce(chunk) for chunk in last.get(index, ())]
        lists.append((*found, Step()) if training else tuple(found))
    return tuple(lists)


def _by_peer(sends: Sequence[Sequence[Sequence[Send]]]) -> dict[tuple[int, int], list[Send]]:
    """(source, peer) → what one sends to the other, in order; `sends`: of each pass of each
    rank."""
    found: dict[tuple[int, int], list[Send]] = {}
    for source, passes_of_rank in enumerate(sends):
        for send in chain.from_iterable(passes_of_rank):
            found.setdefault((source, send.peer), []).append(send)
    return found


def _receives(
    rank: int,
    actions: Sequence[Slot],
    owners: Sequence[int],
    sent: Mapping[tuple[int, int], Sequence[Send]],
) -> dict[int, list[Receive]]:
    """Index of a pass → the receives posted before it begins.

    Messages of a pair of ranks arrive in the order of their sends, so a receive that is needed
    late is posted early where the peer sends it before one that is needed sooner.
    """
    needed_at = {
        (taken.peer, taken.what, taken.chunk, taken.micro_batch): index
        for index, action in enumerate(actions)
        for one in halves(action)
        if (taken := taken_by(one, owners))
    }
    posted: dict[int, list[Receive]] = {}
    for source in sorted({key[0] for key in needed_at}):
        index = len(actions)
        for send in reversed(sent[source, rank]):
            key = (source, send.what, send.chunk, send.micro_batch)
            index = max(0, min(index, needed_at[key] - 1))
            posted.setdefault(index, []).insert(0, Receive(*key[1:], source))
    return posted


def _last_of_chunks(actions: Sequence[Slot]) -> dict[int, list[int]]:
    """Index of a pass → the chunks whose gradients are whole after it."""
    last = {
        one.chunk: index
        for index, action in enumerate(actions)
        for one in halves(action)
        if one.kind in ("W", "BW")
    }
    found: dict[int, list[int]] = {}
    for chunk in sorted(last):
        found.setdefault(last[chunk], []).append(chunk)
    return found


def only_forward(actions: Sequence[Action]) -> list[Compute]:
    """The F passes of a list, in its order."""
    return [one for one in passes(actions) if one.kind == "F"]
