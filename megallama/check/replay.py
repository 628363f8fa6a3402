"""A step's passes of which those that repeat others are replayed, not run.

A chunk's passes of one kind differ from micro-batch to micro-batch in two things that a program
shows: the first may find weights on their way, and with the last gradients are whole and leave.
B and W of a chunk run in ascending order of micro-batches in every schedule, as do its forwards;
all micro-batches have one shape; and no pass sees a value. So the first and the last micro-batch
are run in every step, and in the first step one between them for each kind of pass, which is noted.
All others are that one again: the same operations between the same yields, with the same covers, so
that whoever drives the passes does what it would do anyway. The interpreter and the schedule's list
run whole, at the true number of micro-batches.

Also counted here is what passes keep: the storages of a chunk's set, and how many are alive.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megallama.autograd.passes import Pass, WgradQueue
from megallama.check.program import Log
from megallama.dist.handle import Handle
from megallama.parallel.pipeline import Pipeline
from megallama.parallel.zero import Zero
from megallama.spec.schedules.actions import passes as passes_of
from megallama.train.passes import Held, StepPasses


@dataclass
class _Turn:
    """A pass from one yield to the next: its events, with places counted within the pass; then the
    cover of what it yields, and the places of the operations that are waited for there."""

    events: Sequence[int]
    cover: int = 0
    waits: tuple[int, ...] = ()


@dataclass
class _Tape:
    """One pass as it was seen from outside, and what it returned."""

    turns: list[_Turn] = field(default_factory=list)
    result: Tensor | None = None


@dataclass
class Kept:
    """What the layers of this rank's chunks keep: bytes of a chunk's set, and sets as they come
    and go, in the order of the actions: (chunk, 1 or -1)."""

    bytes_of: dict[int, int] = field(default_factory=dict)
    moves: list[tuple[int, int]] = field(default_factory=list)

    def peak(self) -> int:
        """The most bytes at once."""
        now = most = 0
        for chunk, sign in self.moves:
            now += sign * self.bytes_of[chunk]
            most = max(most, now)
        return most


class ReplayingPipeline:
    """A pipeline whose passes are replayed where they repeat; `everything`: run all of them.

    `kept`: what the layers keep from F to B, and from B to W, in the last step that was run.
    """

    def __init__(self, pipeline: Pipeline, zero: Zero, log: Log, everything: bool) -> None:
        self._pipeline, self._zero, self._log = pipeline, zero, log
        self._everything = everything
        self._tapes: dict[tuple[str, int], _Tape] = {}
        self.kept = Kept(), Kept()

    def run(self, passes: StepPasses) -> None:
        """See `Pipeline.run`."""
        count = len(passes.samples)
        templates = {} if self._everything or self._tapes else self._templates(count)
        run = {0, count - 1, *templates.values()}
        if self._everything:
            run = set(range(count))
        self._zero.expect(len(run))  # of the others no gradient lands
        for each in self.kept:
            each.moves.clear()
        self._pipeline.run(
            _ReplayingPasses(passes, run, templates, self._log, self._tapes, self.kept)
        )

    def _templates(self, count: int) -> dict[tuple[str, int], int]:
        """Of each kind of pass of a chunk the first micro-batch between the first and the last.

        A schedule may split the backward of some micro-batches, and of others not.
        """
        found: dict[tuple[str, int], int] = {}
        for one in passes_of(self._pipeline.schedule.actions[self._pipeline.rank]):
            if 0 < one.micro_batch < count - 1:
                found.setdefault((one.kind, one.chunk), one.micro_batch)
        return found


class _ReplayingPasses:
    """See `parallel.pipeline.ChunkPasses`.

    `run`: the micro-batches that are run; `templates`: by kind and chunk, the one of these that is
    noted in `tapes`.
    """

    def __init__(
        self,
        passes: StepPasses,
        run: Collection[int],
        templates: Mapping[tuple[str, int], int],
        log: Log,
        tapes: dict[tuple[str, int], _Tape],
        kept: tuple[Kept, Kept],
    ) -> None:
        self._passes, self._run, self._templates, self._log = passes, run, templates, log
        self._sets, self._states = kept
        self._tapes = tapes

    def forward(self, chunk: int, micro_batch: int, x: Tensor | None) -> Pass[Tensor | None]:
        self._sets.moves.append((chunk, 1))

        def run() -> Pass[Tensor | None]:
            result = yield from self._passes.forward(chunk, micro_batch, x)
            self._sets.bytes_of[chunk] = layer_bytes(self._passes.saved[chunk, micro_batch])
            return result

        losses = self._passes.losses
        if micro_batch not in self._run and 0 in losses:
            losses[micro_batch] = losses[0]
        return self._pass("F", chunk, micro_batch, run)

    def backward(
        self, chunk: int, micro_batch: int, dz: Tensor | None, queue: WgradQueue
    ) -> Pass[Tensor | None]:
        self._sets.moves.append((chunk, -1))
        backward = self._passes.backward
        return self._pass("BW", chunk, micro_batch, lambda: backward(chunk, micro_batch, dz, queue))

    def backward_activations(
        self, chunk: int, micro_batch: int, dz: Tensor | None
    ) -> Pass[Tensor | None]:
        self._sets.moves.append((chunk, -1))
        self._states.moves.append((chunk, 1))

        def run() -> Pass[Tensor | None]:
            result = yield from self._passes.backward_activations(chunk, micro_batch, dz)
            self._states.bytes_of[chunk] = layer_bytes(self._passes.kept[chunk, micro_batch])
            return result

        return self._pass("B", chunk, micro_batch, run)

    def backward_weights(self, chunk: int, micro_batch: int) -> Pass[None]:
        weights = self._passes.backward_weights

        def run() -> Pass[None]:
            yield from weights(chunk, micro_batch)
            self._states.moves.append((chunk, -1))

        return self._pass("W", chunk, micro_batch, run)

    def buffer(self) -> Tensor:
        return self._passes.buffer()

    def reduce(self, chunk: int) -> None:
        self._passes.reduce(chunk)

    def step(self) -> None:
        self._passes.step()

    def _pass(
        self, kind: str, chunk: int, micro_batch: int, run: Callable[[], Pass[Any]]
    ) -> Pass[Any]:
        if micro_batch not in self._run:
            return self._replayed(kind, chunk)
        if micro_batch != self._templates.get((kind, chunk)):
            return run()
        tape = self._tapes[kind, chunk] = _Tape()
        return _taped(run(), tape, self._log)

    def _replayed(self, kind: str, chunk: int) -> Pass[Any]:
        tape, log = self._tapes[kind, chunk], self._log
        places: list[int] = []
        for turn in tape.turns:
            for event in turn.events:
                if event >= 0:
                    places.append(log.issue_again(event))
                else:
                    log.wait(places[-1 - event])
            if turn is not tape.turns[-1]:
                yield _Again(log, [places[place] for place in turn.waits], turn.cover)
        if kind == "W":
            self._states.moves.append((chunk, -1))
        return tape.result


@dataclass
class _Again:
    """A handle that waits for operations of a replayed pass."""

    log: Log
    places: Sequence[int]
    cover: int

    def wait(self) -> None:
        for place in self.places:
            self.log.wait(place)


class _Watched:
    """A handle that a taped pass yields: what is waited for is written to its turn."""

    def __init__(self, handle: Handle[Any], log: Log, turn: _Turn, places: dict[int, int]) -> None:
        self.cover = handle.cover
        self._handle, self._log, self._turn, self._places = handle, log, turn, places

    def wait(self) -> Any:
        begin = len(self._log.events)
        value = self._handle.wait()
        # A wait for anything but the pass's own would be a KeyError: the first micro-batch has
        # waited for what came from elsewhere.
        waits = self._log.events[begin:]
        self._turn.waits = tuple(self._places[-1 - event] for event in waits)
        return value


def _taped(coroutine: Pass[Any], tape: _Tape, log: Log) -> Pass[Any]:
    """Run a pass and note it."""
    places: dict[int, int] = {}  # of the operations that it issued: in all, to within it

    def turn(begin: int, first: int) -> _Turn:
        events = array("l")
        for event in log.events[begin:]:
            if event >= 0:
                events.append(event)
                places[first] = len(places)
                first += 1
            else:
                events.append(-1 - places[-1 - event])
        return _Turn(events)

    value: Any = None
    while True:
        begin, first = len(log.events), log.issued
        try:
            handle = coroutine.send(value)
        except StopIteration as end:
            tape.turns.append(turn(begin, first))
            tape.result = end.value
            return end.value
        tape.turns.append(turn(begin, first))
        tape.turns[-1].cover = handle.cover
        value = yield _Watched(handle, log, tape.turns[-1], places)


def layer_bytes(held: Held) -> int:
    """Bytes of the storages that the layers' sets keep alive, each counted once.

    By their handles: on the meta device no storage has an address.
    """
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for key in held.stash
        if isinstance(key, int)  # the others are the embedding's and the head's
        for t in held.stash.peek(key).values()
    }
    return sum(storages.values())
