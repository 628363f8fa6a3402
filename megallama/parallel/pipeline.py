"""The pipeline's interpreter: runs one rank's list of actions, whatever the schedule.

It knows no model. What a pass does is the business of the `ChunkPasses` that it is given; what is
sent where and when is the list's. It adds no action and skips none; a W may begin in the waits of
the B before it, and ends at its own place.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

from torch import Tensor

from megallama.autograd.passes import Beside, Pass, WgradQueue, both, drive
from megallama.dist.group import Group
from megallama.dist.handle import Done, Handle
from megallama.dist.recorder import Event, Recorder
from megallama.spec.schedules.actions import (
    Action,
    Compute,
    Fused,
    Message,
    Receive,
    Reduce,
    Schedule,
    Send,
    Step,
)


class ChunkPasses(Protocol):
    """What the actions of one step do to this rank's chunks.

    `x` is a chunk's input, None of the first; `dz` its output's gradient, None of the last. Every
    pass returns what goes on to the next chunk in its direction, None at the ends.
    """

    def forward(self, chunk: int, micro_batch: int, x: Tensor | None) -> Pass[Tensor | None]: ...

    def backward(
        self, chunk: int, micro_batch: int, dz: Tensor | None, queue: WgradQueue
    ) -> Pass[Tensor | None]:
        """BW: weight gradients go to the queue."""
        ...

    def backward_activations(
        self, chunk: int, micro_batch: int, dz: Tensor | None
    ) -> Pass[Tensor | None]:
        """B: what W needs is kept."""
        ...

    def backward_weights(self, chunk: int, micro_batch: int) -> Pass[None]:
        """W."""
        ...

    def buffer(self) -> Tensor:
        """An empty tensor for what travels between chunks."""
        ...

    def reduce(self, chunk: int) -> None: ...

    def step(self) -> None: ...


#: What travels: activations or gradient, for which chunk, of which micro-batch.
Key = tuple[str, int, int]


class Pipeline:
    """One rank's list and its links to other ranks.

    `links`: (source, destination) → the group of these two, in that order. A link carries one
    direction, so a receive that is posted early blocks no send. `overlap`: weight gradients fill
    waits within a BW; `fill`: those of a W action fill the waits of the B before it, which is worth
    its later end only where a B has something to wait for: among several tensor ranks.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        links: Mapping[tuple[int, int], Group],
        overlap: bool = True,
        fill: bool = True,
        recorder: Recorder | None = None,
    ) -> None:
        self.schedule, self.rank, self.links = schedule, rank, links
        self.overlap, self.fill = overlap, fill
        self.recorder = recorder or Recorder()

    def run(self, passes: ChunkPasses) -> None:
        """Run the list once.

        Raises:
            LostError: another rank does not answer.
        """
        run = _Run(self, passes)
        for action in self.schedule.actions[self.rank]:
            run.do(action)
        for sent in run.sends:
            sent.wait()


class _Run:
    """The state of one walk through the list.

    `here`: what arrives, or was made here and is not used or sent yet. `begun`: weight gradients
    that already fill other passes' waits.
    """

    def __init__(self, pipeline: Pipeline, passes: ChunkPasses) -> None:
        self.pipeline, self.passes = pipeline, passes
        self.last = pipeline.schedule.chunks - 1
        actions = pipeline.schedule.actions[pipeline.rank]
        self.fillers = _fillers(actions) if pipeline.fill else {}
        self.here: dict[Key, Handle[Tensor]] = {}
        self.begun: dict[tuple[int, int], Beside[None]] = {}
        self.sends: list[Handle[None]] = []

    def do(self, action: Action) -> None:
        if isinstance(action, Send):
            link = self.pipeline.links[self.pipeline.rank, action.peer]
            x = self.here.pop(_key(action)).wait()
            self.sends.append(link.send(x, 1, action.label))
        elif isinstance(action, Receive):
            link = self.pipeline.links[action.peer, self.pipeline.rank]
            buffer = self.passes.buffer()
            self.here[_key(action)] = link.receive(buffer, 0, action.label)
        else:
            taken = self._inputs(action)
            begin = time.monotonic()
            self._run(action, taken)
            self._record(action, begin)

    def _run(self, action: Action, taken: Sequence[Tensor | None]) -> None:
        if isinstance(action, Fused):
            self._fused(action, taken)
        elif isinstance(action, Compute):
            self._compute(action, taken[0])
        elif isinstance(action, Reduce):
            self.passes.reduce(action.chunk)
        elif isinstance(action, Step):
            self.passes.step()

    def _compute(self, one: Compute, x: Tensor | None) -> None:
        if one.kind == "F":
            self._made(one, drive(self.passes.forward(one.chunk, one.micro_batch, x)))
        elif one.kind == "BW":
            queue = WgradQueue(self.pipeline.overlap)
            self._made(one, drive(self._backward(one, x, queue), queue))
        elif one.kind == "B":
            backward = self.passes.backward_activations(one.chunk, one.micro_batch, x)
            filler = self.fillers.get(one)
            self._made(one, drive(backward, self._weights(filler) if filler else None))
        else:
            self._weights(one).finish()
            del self.begun[one.chunk, one.micro_batch]

    def _fused(self, pair: Fused, taken: Sequence[Tensor | None]) -> None:
        queue = WgradQueue(self.pipeline.overlap)
        forward, backward = pair.forward, pair.backward
        z, dx = drive(
            both(
                self.passes.forward(forward.chunk, forward.micro_batch, taken[0]),
                self._backward(backward, taken[1], queue),
            ),
            queue,
        )
        self._made(forward, z)
        self._made(backward, dx)

    def _backward(self, one: Compute, dz: Tensor | None, queue: WgradQueue) -> Pass[Tensor | None]:
        return self.passes.backward(one.chunk, one.micro_batch, dz, queue)

    def _weights(self, one: Compute) -> Beside[None]:
        key = one.chunk, one.micro_batch
        if key not in self.begun:
            self.begun[key] = Beside(self.passes.backward_weights(*key))
        return self.begun[key]

    def _inputs(self, action: Action) -> list[Tensor | None]:
        """Wait for what the action's passes take."""
        if isinstance(action, Fused):
            return [self._input(action.forward), self._input(action.backward)]
        return [self._input(action)] if isinstance(action, Compute) else []

    def _input(self, one: Compute) -> Tensor | None:
        if one.kind == "W" or one.chunk == (0 if one.kind == "F" else self.last):
            return None
        what = "activations" if one.kind == "F" else "gradient"
        return self.here.pop((what, one.chunk, one.micro_batch)).wait()

    def _made(self, one: Compute, result: Tensor | None) -> None:
        """Keep what a pass made for the next chunk, here or on another rank."""
        if result is None:
            return
        what, chunk = ("activations", 1) if one.kind == "F" else ("gradient", -1)
        self.here[what, one.chunk + chunk, one.micro_batch] = Done(result)

    def _record(self, action: Action, begin: float) -> None:
        kinds: dict[type[Any], str] = {Fused: "FB", Reduce: "reduce", Step: "step"}
        kind = action.kind if isinstance(action, Compute) else kinds[type(action)]
        event = Event("compute", kind, str(action), begin, time.monotonic())
        self.pipeline.recorder.add(event)


def _key(message: Message) -> Key:
    return message.what, message.chunk, message.micro_batch


def _fillers(actions: Sequence[Action]) -> dict[Compute, Compute]:
    """B → the W that is the next pass of its list, if it is not B's own.

    With only itself to run, a B's collectives would be bare; that W goes on in its waits.
    """
    return {
        b: w
        for b, w in pairwise(a for a in actions if isinstance(a, Compute | Fused))
        if isinstance(b, Compute) and isinstance(w, Compute)
        if (b.kind, w.kind) == ("B", "W")
        if (b.chunk, b.micro_batch) != (w.chunk, w.micro_batch)
    }
