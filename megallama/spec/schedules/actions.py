"""What a pipeline schedule is made of.

The model is cut into chunks, numbered from the embedding to the head; each pipeline rank has one or
several (virtual stages). A schedule gives every rank its list of actions. The interpreter runs the
list as it stands, the simulator times it, the command line draws it, the tests check it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

#: F: forward. B: backward for the activations. W: backward for the weights. BW: both at once, as
#: where nothing is gained by W's coming later.
Kind = Literal["F", "B", "W", "BW"]


@dataclass(frozen=True)
class Compute:
    """One pass of a chunk over a micro-batch."""

    kind: Kind
    chunk: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}({self.chunk}, {self.micro_batch})"


@dataclass(frozen=True)
class Fused:
    """FB: one micro-batch's forward and another's backward, driven together.

    Each pass's collectives are hidden under the other's compute. Both must have what they need
    before the action begins, and what both made is there when it ends.
    """

    forward: Compute
    backward: Compute

    def __str__(self) -> str:
        return f"{self.forward}+{self.backward}"


@dataclass(frozen=True)
class Message:
    """What travels between two ranks, to or from pipeline rank `peer`.

    `what`: the activations that `chunk` takes in its forward, or the gradient that it takes in its
    backward.
    """

    what: Literal["activations", "gradient"]
    chunk: int
    micro_batch: int
    peer: int

    @property
    def label(self) -> str:
        """The same text at both ends; it names the pass that makes it."""
        kind, maker = ("F", self.chunk - 1) if self.what == "activations" else ("B", self.chunk + 1)
        return f"{self.what} of {kind}({maker}, {self.micro_batch})"


@dataclass(frozen=True)
class Send(Message):
    """Start sending; nobody waits for it before the step ends."""


@dataclass(frozen=True)
class Receive(Message):
    """Start receiving; the pass that needs it waits for it."""


@dataclass(frozen=True)
class Reduce:
    """The chunk's gradients are whole: from here their sum over the data ranks is under way."""

    chunk: int


@dataclass(frozen=True)
class Step:
    """The optimizer's step; the last action of every list."""


Action = Compute | Fused | Send | Receive | Reduce | Step


@dataclass(frozen=True)
class Schedule:
    """The lists of all pipeline ranks. `owners[chunk]` is the rank that has the chunk."""

    name: str
    micro_batches: int
    owners: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]

    @property
    def stages(self) -> int:
        """The number of pipeline ranks."""
        return len(self.actions)

    @property
    def chunks(self) -> int:
        """The number of chunks of all ranks together."""
        return len(self.owners)

    def chunks_of(self, rank: int) -> tuple[int, ...]:
        """The chunks of a rank, ascending."""
        return tuple(chunk for chunk, owner in enumerate(self.owners) if owner == rank)

    @property
    def links(self) -> frozenset[tuple[int, int]]:
        """(source, destination) of every pair of ranks between which something is sent."""
        return frozenset(
            (rank, action.peer)
            for rank, actions in enumerate(self.actions)
            for action in actions
            if isinstance(action, Send)
        )


def passes(actions: Sequence[Action]) -> tuple[Compute, ...]:
    """The passes of a list in order, those of a fused action one after the other."""
    found: list[Compute] = []
    for action in actions:
        if isinstance(action, Compute):
            found.append(action)
        elif isinstance(action, Fused):
            found += [action.forward, action.backward]
    return tuple(found)
