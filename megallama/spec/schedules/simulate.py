"""A schedule's time, by simulating what its ranks do and what they wait for."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from megallama.spec.schedules.actions import (
    Action,
    Compute,
    Fused,
    Message,
    Receive,
    Schedule,
    Send,
)
from megallama.spec.schedules.messages import Slot, halves, taken_by
from megallama.spec.schedules.promises import peak_in_flight, peak_weight_states


class ScheduleError(RuntimeError):
    """The lists cannot be run: a deadlock, an order that is wrong, a message that is not there."""


@dataclass(frozen=True)
class Timed:
    """A pass, or a fused action, with its time."""

    action: Slot
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """Every rank's timed passes, and what follows from them.

    `bubble`: the longest rank span, from a rank's own first pass to its own last, less a rank's
    work. `bubble_fraction`: the bubble ÷ that span (arXiv 2401.10241, §5.3). `makespan`: from the
    first pass of all to the last.
    """

    schedule: Schedule
    ranks: tuple[tuple[Timed, ...], ...]
    makespan: float
    bubble: float
    bubble_fraction: float

    @property
    def peak_in_flight(self) -> tuple[int, ...]:
        """By rank: saved sets of a chunk and micro-batch alive at once, from F to B."""
        return tuple(peak_in_flight(actions) for actions in self.schedule.actions)

    @property
    def peak_weight_states(self) -> tuple[int, ...]:
        """By rank: weight states of a chunk and micro-batch alive at once, from B to W."""
        return tuple(peak_weight_states(actions) for actions in self.schedule.actions)

    @property
    def activation_memory(self) -> tuple[float, ...]:
        """By rank, in units of what all chunks of a rank save of one micro-batch."""
        per_rank = self.schedule.chunks / self.schedule.stages
        return tuple(peak / per_rank for peak in self.peak_in_flight)


def simulate(
    schedule: Schedule,
    forward: float = 1.0,
    backward: float = 1.0,
    weight: float = 1.0,
    latency: float = 0.0,
) -> Simulation:
    """Run the lists as they stand; each pass waits for its rank and for what it takes.

    Times are those of F, B and W of a rank's whole share of a micro-batch; a chunk takes its part.
    Sends and receives take no time of the rank. The k-th send of an ordered pair of ranks meets the
    k-th receive, and arrives `latency` after the later of both. A fused action takes as long as its
    two passes.

    Raises:
        ScheduleError: a deadlock, with what each stuck rank waits for; a pass before one that it
            builds on; a message without its receive or send; two that meet and are not the same.
    """
    chunks_per_rank = schedule.chunks // schedule.stages
    seconds = {"F": forward, "B": backward, "W": weight, "BW": backward + weight}
    seconds = {kind: time / chunks_per_rank for kind, time in seconds.items()}
    timed = _Run(schedule, seconds, latency).run()
    spans = [rank[-1].end - rank[0].start for rank in timed if rank]
    work = max(
        sum(seconds[one.kind] for each in rank for one in halves(each.action)) for rank in timed
    )
    span = max(spans)
    ends = [rank[-1].end for rank in timed if rank]
    starts = [rank[0].start for rank in timed if rank]
    bubble = span - work
    return Simulation(
        schedule, timed, max(ends) - min(starts), bubble, bubble / span if span else 0.0
    )


_Pass = tuple[str, int, int]  # "F", "B" or "W" (both of a BW); chunk; micro-batch
_Content = tuple[str, int, int]  # what, chunk, micro-batch


@dataclass
class _Link:
    """The messages of one ordered pair of ranks: what was sent and posted, and when."""

    sent: list[tuple[_Content, float]] = field(default_factory=list)
    posted: list[tuple[_Content, float]] = field(default_factory=list)
    index: dict[_Content, int] = field(default_factory=dict)  # of a posted receive

    def check(self, k: int, source: int, destination: int) -> None:
        """Raises ScheduleError where the k-th send meets another message's receive."""
        if k < min(len(self.sent), len(self.posted)) and self.sent[k][0] != self.posted[k][0]:
            raise ScheduleError(
                f"message {k} from rank {source} to rank {destination}: {_label(self.sent[k][0])} "
                f"is sent, {_label(self.posted[k][0])} is received"
            )


@dataclass
class _Rank:
    """How far a rank is: its next action, when it is free, and what it has finished."""

    actions: Sequence[Action]
    at: int = 0
    free: float = 0.0
    done: set[_Pass] = field(default_factory=set)
    timed: list[Timed] = field(default_factory=list)


class _Run:
    """One simulation. Ranks go on one after the other, each until it waits for another one.

    The order in which they are looked at changes no time: a time is fixed by the lists alone.
    """

    def __init__(self, schedule: Schedule, seconds: dict[str, float], latency: float) -> None:
        self.owners = schedule.owners
        self.seconds = seconds
        self.latency = latency
        self.ranks = [_Rank(actions) for actions in schedule.actions]
        self.links: defaultdict[tuple[int, int], _Link] = defaultdict(_Link)

    def run(self) -> tuple[tuple[Timed, ...], ...]:
        waiting = deque(range(len(self.ranks)))
        while waiting:
            rank = waiting.popleft()
            waiting.extend(self._go_on(rank) - set(waiting))
        self._refuse_stuck()
        self._refuse_unmet()
        return tuple(tuple(rank.timed) for rank in self.ranks)

    def _go_on(self, number: int) -> set[int]:
        """Run a rank until it waits or ends; the ranks to which it has sent something."""
        rank, told = self.ranks[number], set()
        while rank.at < len(rank.actions):
            action = rank.actions[rank.at]
            if isinstance(action, Compute | Fused):
                if not self._compute(number, action):
                    break
            elif isinstance(action, Send):
                link = self.links[number, action.peer]
                link.sent.append((_content(action), rank.free))
                link.check(len(link.sent) - 1, number, action.peer)
                told.add(action.peer)
            elif isinstance(action, Receive):
                link = self.links[action.peer, number]
                link.index[_content(action)] = len(link.posted)
                link.posted.append((_content(action), rank.free))
                link.check(len(link.posted) - 1, action.peer, number)
            rank.at += 1
        return told

    def _compute(self, number: int, action: Slot) -> bool:
        """Run a pass if all that it takes has a time; whether it did."""
        rank = self.ranks[number]
        start = rank.free
        for one in halves(action):
            self._refuse_early(number, action, one)
            taken = taken_by(one, self.owners)
            if taken is None:
                continue
            arrival = self._arrival(number, one, taken)
            if arrival is None:
                return False
            start = max(start, arrival)
        rank.free = start + sum(self.seconds[one.kind] for one in halves(action))
        rank.timed.append(Timed(action, start, rank.free))
        for one in halves(action):
            rank.done.update((kind, one.chunk, one.micro_batch) for kind in one.kind)
        return True

    def _arrival(self, number: int, one: Compute, taken: Message) -> float | None:
        """When a message is there; None where it has not been sent yet."""
        link = self.links[taken.peer, number]
        k = link.index.get(_content(taken))
        if k is None:
            raise ScheduleError(f"rank {number}: {one} takes {taken.label}; no receive is posted")
        if k >= len(link.sent):
            return None
        return max(link.sent[k][1], link.posted[k][1]) + self.latency

    def _refuse_early(self, number: int, action: Slot, one: Compute) -> None:
        """Raises ScheduleError where a pass waits for one that its own rank has not run before."""
        done, chunk, i = self.ranks[number].done, one.chunk, one.micro_batch
        if one.kind == "F":
            needs: list[_Pass] = [("F", chunk - 1, i)] if chunk else []
        elif one.kind == "W":
            needs = [("B", chunk, i)]
        else:
            needs = [("F", chunk, i)]
            needs += [("B", chunk + 1, i)] if chunk + 1 < len(self.owners) else []
        for kind, other, _ in needs:
            if self.owners[other] == number and (kind, other, i) not in done:
                raise ScheduleError(
                    f"deadlock: rank {number} at {action} waits for its own {kind}({other}, {i}), "
                    "which does not stand before it"
                )

    def _refuse_stuck(self) -> None:
        stuck = []
        for number, rank in enumerate(self.ranks):
            if rank.at < len(rank.actions):
                action = rank.actions[rank.at]
                assert isinstance(action, Compute | Fused), "nothing else waits"
                missing = [
                    f"{taken.label} from rank {taken.peer}"
                    for one in halves(action)
                    if (taken := taken_by(one, self.owners))
                    and self._arrival(number, one, taken) is None
                ]
                stuck.append(f"rank {number} at {action} waits for {' and '.join(missing)}")
        if stuck:
            raise ScheduleError(f"deadlock: {'; '.join(stuck)}")

    def _refuse_unmet(self) -> None:
        for (source, destination), link in self.links.items():
            sent, posted = len(link.sent), len(link.posted)
            if sent != posted:
                content = (link.sent if sent > posted else link.posted)[min(sent, posted)][0]
                raise ScheduleError(
                    f"{_label(content)} from rank {source} to rank {destination} is "
                    f"{'sent, never received' if sent > posted else 'received, never sent'}"
                )


def _content(message: Message) -> _Content:
    return (message.what, message.chunk, message.micro_batch)


def _label(content: _Content) -> str:
    what, chunk, micro_batch = content
    return f"{what} for chunk {chunk} of micro-batch {micro_batch}"
