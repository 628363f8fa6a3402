"""A pipeline's time from its own action lists, fast enough for a search.

`spec.schedules.simulate` checks lists and times them in units; this times lists that are known to
be right, with a time for every kind of pass of every chunk, and goes from a few micro-batches to
many by the steady state's period.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import TypeAlias

from megallama.spec.schedules.actions import Compute, Fused, Receive, Schedule, Send
from megallama.spec.schedules.build import make_schedule
from megallama.spec.schedules.messages import Slot, halves, taken_by

#: A kind of pass and what it is of: F, BW, B or W and a chunk; FB and both chunks; "B+" and the
#: chunks of a B and of the W that fills its waits; "W-", what is left of such a W, its B's chunk
#: and its own.
Key = tuple[str, int, int]


@dataclass(frozen=True)
class Node:
    """A pass of a rank. `takes`: for each message that it needs, the node that makes it and the one
    before which this rank posted its receive (-1: at the begin). `opens`, `closes`: the chunk whose
    first or last pass it is (-1: of none); `messages`: those that it makes and takes."""

    rank: int
    action: Slot
    key: Key
    takes: tuple[tuple[int, int], ...]
    before: int
    opens: int
    closes: int
    messages: int


@dataclass(frozen=True)
class Times:
    """Of a simulated pipeline: every node's start and end, in the order of `Plan.nodes`."""

    starts: Sequence[float]
    ends: Sequence[float]


_Row: TypeAlias = tuple[int, int, tuple[tuple[int, int, int], ...], int, int, int]


@dataclass(frozen=True)
class Plan:
    """A schedule's passes in an order in which each comes after what it needs."""

    schedule: Schedule
    nodes: tuple[Node, ...]
    last: tuple[int, ...]
    """Each rank's last node."""
    work: tuple[Mapping[Key, int], ...]
    """How often each rank runs each kind of pass."""
    keys: tuple[Key, ...]
    links: tuple[tuple[int, int], ...]
    rows: tuple[_Row, ...]
    """The nodes again, for speed: the node before, the place of its key, for each message its
    maker, its receive and the place of its link, `opens`, `closes` and `messages`."""

    @cached_property
    def closing(self) -> tuple[int, ...]:
        """The nodes that are the last of a chunk's."""
        return tuple(index for index, node in enumerate(self.nodes) if node.closes >= 0)

    def run(
        self,
        seconds: Mapping[Key, float],
        latency: float | Mapping[tuple[int, int], float] = 0.0,
        ready: Mapping[int, tuple[float, float]] | None = None,
        late: Mapping[int, float] | None = None,
        blocked: float = 0.0,
    ) -> Times:
        """Time the passes.

        `latency`: from the later of a message's send and its receive to its arrival, of all ranks
        or of (source, destination). `ready`: of a chunk whose weights are still arriving, the
        earliest end of its first pass, and the seconds by which that is slower. `late`: those of
        the last pass of a chunk whose gradients leave under it. `blocked`: seconds that a rank
        spends itself on each message that it sends or takes.
        """
        each = [seconds.get(key, 0.0) for key in self.keys]
        if isinstance(latency, Mapping):
            delays = [latency[link] for link in self.links]
        else:
            delays = [latency] * len(self.links)
        starts = [0.0] * len(self.rows)
        ends = [0.0] * (len(self.rows) + 1)  # the last is what -1 finds: the begin
        for index, (before, key, takes, opens, closes, messages) in enumerate(self.rows):
            start = ends[before]
            for maker, posted, link in takes:
                sent, other = ends[maker], ends[posted]
                arrival = (sent if sent > other else other) + delays[link]
                if arrival > start:
                    start = arrival
            starts[index] = start
            end = start + each[key]
            if blocked:
                end += blocked * messages
            if opens >= 0 and ready and opens in ready:
                floor, slower = ready[opens]
                end = max(end + slower, floor)
            if closes >= 0 and late and closes in late:
                end += late[closes]
            ends[index] = end
        ends.pop()
        return Times(starts, ends)

    def makespan(self, times: Times) -> float:
        return max(times.ends[index] for index in self.last)


@lru_cache(maxsize=512)
def plan_of(name: str, stages: int, micro_batches: int, virtual_stages: int, fills: bool) -> Plan:
    """`fills`: a W runs in the waits of the B before it (`parallel.pipeline`).

    Raises:
        ConfigError: the schedule does not take these numbers.
    """
    return compile_plan(make_schedule(name, stages, micro_batches, virtual_stages), fills)


def compile_plan(schedule: Schedule, fills: bool) -> Plan:
    return _Compiler(schedule, fills).plan()


@dataclass
class _Rank:
    """How far a rank is, and what it has posted: message → the node before the receive."""

    at: int = 0
    last: int = -1
    posted: dict[tuple[str, int, int], int] = field(default_factory=dict)


class _Compiler:
    def __init__(self, schedule: Schedule, fills: bool) -> None:
        self.schedule, self.owners = schedule, schedule.owners
        self.keys = [_keys(actions, fills) for actions in schedule.actions]
        self.nodes: list[Node] = []
        self.made: dict[tuple[str, int, int], int] = {}
        self.ranks = [_Rank() for _ in schedule.actions]
        self.waiting: deque[int] = deque(range(len(self.ranks)))

    def plan(self) -> Plan:
        while self.waiting:
            rank = self.waiting.popleft()
            for other in self._go_on(rank):
                if other not in self.waiting:
                    self.waiting.append(other)
        work: list[dict[Key, int]] = [{} for _ in self.ranks]
        for node in self.nodes:
            work[node.rank][node.key] = work[node.rank].get(node.key, 0) + 1
        last = tuple(rank.last for rank in self.ranks)
        keys = tuple(dict.fromkeys(node.key for node in self.nodes))
        links = tuple(sorted(self.schedule.links))
        rows = self._rows({key: i for i, key in enumerate(keys)}, links)
        return Plan(self.schedule, tuple(self.nodes), last, tuple(work), keys, links, rows)

    def _rows(
        self, places: Mapping[Key, int], links: Sequence[tuple[int, int]]
    ) -> tuple[_Row, ...]:
        rows: list[_Row] = []
        for node in self.nodes:
            takes = tuple(
                (maker, posted, links.index((self.nodes[maker].rank, node.rank)))
                for maker, posted in node.takes
            )
            ends = node.opens, node.closes, node.messages
            rows.append((node.before, places[node.key], takes, *ends))
        return tuple(rows)

    def _go_on(self, number: int) -> set[int]:
        rank, told = self.ranks[number], set()
        actions = self.schedule.actions[number]
        while rank.at < len(actions):
            action = actions[rank.at]
            if isinstance(action, Receive):
                rank.posted[action.what, action.chunk, action.micro_batch] = rank.last
            elif isinstance(action, Send):
                told.add(action.peer)
            elif isinstance(action, Compute | Fused) and not self._add(number, action):
                break
            rank.at += 1
        return told

    def _add(self, number: int, action: Slot) -> bool:
        rank, takes = self.ranks[number], []
        for one in halves(action):
            taken = taken_by(one, self.owners)
            if taken is not None:
                content = (taken.what, taken.chunk, taken.micro_batch)
                if content not in self.made:
                    return False
                takes.append((self.made[content], rank.posted[content]))
        index = len(self.nodes)
        opens, closes = self._ends(action)
        messages = len(takes)
        for one in halves(action):
            if one.kind == "F":
                self.made["activations", one.chunk + 1, one.micro_batch] = index
            elif one.kind in ("B", "BW"):
                self.made["gradient", one.chunk - 1, one.micro_batch] = index
            messages += self._sends(one)
        key = self.keys[number][action]
        node = Node(number, action, key, tuple(takes), rank.last, opens, closes, messages)
        self.nodes.append(node)
        rank.last = index
        return True

    def _sends(self, one: Compute) -> bool:
        taker = one.chunk + {"F": 1, "B": -1, "BW": -1, "W": 0}[one.kind]
        return 0 <= taker < len(self.owners) and self.owners[taker] != self.owners[one.chunk]

    def _ends(self, action: Slot) -> tuple[int, int]:
        last = self.schedule.micro_batches - 1
        opens = [o.chunk for o in halves(action) if o.kind == "F" and o.micro_batch == 0]
        closes = [
            o.chunk for o in halves(action) if o.kind in ("W", "BW") and o.micro_batch == last
        ]
        return max(opens, default=-1), max(closes, default=-1)


def _keys(actions: Sequence[object], fills: bool) -> dict[Slot, Key]:
    """What kind of pass each action of a list is."""
    slots = [action for action in actions if isinstance(action, Compute | Fused)]
    found: dict[Slot, Key] = {}
    for slot in slots:
        if isinstance(slot, Fused):
            found[slot] = "FB", slot.forward.chunk, slot.backward.chunk
        else:
            found[slot] = slot.kind, slot.chunk, slot.chunk
    for b, w in pairwise(slots) if fills else ():  # `parallel.pipeline._fillers`
        if not isinstance(b, Compute) or not isinstance(w, Compute):
            continue
        own = (b.chunk, b.micro_batch) == (w.chunk, w.micro_batch)
        if (b.kind, w.kind) == ("B", "W") and not own:
            found[b] = "B+", b.chunk, w.chunk
            found[w] = "W-", b.chunk, w.chunk
    return found


def period(schedule: str, stages: int) -> int:
    """Micro-batches after which the steady state repeats.

    As many as go round in a circle of passes that wait for each other: the p that an interleaved
    schedule takes together, or that 1F1B's first rank has under way when messages take time; the
    fused one's has twice as many.
    """
    return 2 * stages if schedule == "1f1b-fused" else stages


def few_micro_batches(schedule: str, stages: int, micro_batches: int) -> int:
    """As many as show the steady state; more by whole periods make up `micro_batches`."""
    each = period(schedule, stages)
    enough = 2 * stages + 2
    if micro_batches <= enough + 2 * each:
        return micro_batches
    return enough + (micro_batches - enough) % each
