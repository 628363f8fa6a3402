"""The moments of a rank's list: how much is kept at each pass, and what the pass works with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from megallama.spec.schedules.actions import Action, Compute, Fused, Receive, Send, passes
from megallama.spec.workspaces import (
    AT_ONCE,
    BELOW,
    BESIDE,
    EMBEDDING,
    FORWARD,
    HEAD,
    JOINED,
    SPLIT,
    WEIGHTS,
    Moment,
    Workspaces,
)


@dataclass(frozen=True)
class Part:
    """A chunk: its layers, and which ends of the model it has."""

    layers: int
    embedding: bool
    head: bool


@dataclass(frozen=True)
class Unit:
    """Bytes of one of each thing that is kept.

    `saved` and `state`: of a layer, from F to B and from B to W. `stream`: a message between
    pipeline ranks, what the embedding leaves for its W, or half of what the head saves. `inputs`:
    of a micro-batch. `output` and `layer`: the copy that is made of the output projection's or a
    layer's gradients when the data ranks' are added.
    """

    saved: int
    state: int
    stream: int
    inputs: int
    output: int = 0
    layer: int = 0


@dataclass(frozen=True)
class Point:
    """A moment of a pass: the bytes of its workspace; and by how many the layers' sets, their
    states and the head's sets differ from all that are kept before the pass or after it."""

    name: str
    workspace: int
    sets: int = 0
    states: int = 0
    heads: int = 0


class Moments:
    """The points of one rank's passes. `queued`: weight gradients are put off to later waits;
    `fills`: those of a W run in the waits of the B before it; `keeps_sent`: what was sent lives to
    the step's end."""

    def __init__(
        self,
        parts: Mapping[int, Part],
        unit: Unit,
        spaces: Workspaces,
        *,
        queued: bool,
        fills: bool,
        keeps_sent: bool,
    ) -> None:
        self.parts, self.unit, self.spaces = parts, unit, spaces
        self.queued, self.fills, self.keeps_sent = queued, fills, keeps_sent
        self._points: dict[tuple[str, int, int], Point] = {}

    def worst(self, actions: Sequence[Action]) -> dict[str, int]:
        """What is kept and worked with when that is most, by item."""
        kept, found = _Kept(self.parts, self.unit), dict[str, int]()
        last = max(one.micro_batch for one in passes(actions))
        following = dict(pairwise(a for a in actions if isinstance(a, Compute | Fused)))
        for action in actions:
            if isinstance(action, Receive):
                kept.arriving.add((action.what, action.chunk, action.micro_batch))
            elif isinstance(action, Send):
                kept.sent += self.keeps_sent
            elif isinstance(action, Compute | Fused):
                pair = passes((action,))
                kept.begin(pair)
                held = kept.at(self._point(action, following.get(action), last))
                found = max(found, held, key=lambda sizes: sum(sizes.values()))
                kept.end(pair)
        return found

    def _point(self, action: Compute | Fused, then: Action | None, last: int) -> Point:
        """The worst one of an action."""
        if isinstance(action, Fused):
            key = "FB", action.forward.chunk, action.backward.chunk
        elif action.kind == "B":  # its own W cannot run in its waits
            fills = isinstance(then, Compute) and then.kind == "W"
            fills = fills and then != replace(action, kind="W")
            key = "B", action.chunk, int(fills and self.fills)
        else:
            key = action.kind, action.chunk, int(action.micro_batch == last)
        if key not in self._points:
            self._points[key] = max(self._all_points(*key), key=self._more)
        return self._points[key]

    def _more(self, point: Point) -> int:
        """Bytes by which a point is above what is kept."""
        unit = self.unit
        layers = point.sets * unit.saved + point.states * unit.state
        return point.workspace + layers + point.heads * 2 * unit.stream

    def _all_points(self, kind: str, chunk: int, more: int) -> Iterator[Point]:
        """Of a pass; `more`: whether it is the last micro-batch's, whether a B has a W in its
        waits, or the chunk that a fused action's backward is of."""
        part = self.parts[chunk]
        if kind == "F":
            return self._forward(part)
        if kind == "BW":
            return self._joined(part, bool(more))
        if kind == "B":
            return self._split(part, bool(more))
        return self._weights(part, bool(more)) if kind == "W" else self._fused(chunk, more)

    def _forward(self, part: Part) -> Iterator[Point]:
        for point in self._layer(FORWARD):
            yield replace(point, heads=-part.head)
        for moment in HEAD if part.head else ():
            yield Point(moment.name, self._apart(moment), heads=-1)

    def _joined(self, part: Part, last: bool) -> Iterator[Point]:
        """The worst is at the topmost layer, which has all sets of the others beside its own.

        The last micro-batch's gradients are summed from then on: the output's under the topmost
        layer, a layer's under the one below.
        """
        rows = self._layer(JOINED if self.queued else AT_ONCE)
        output, layer = (self.unit.output, self.unit.layer) if last else (0, 0)
        for point in rows:
            more = output if part.head else 0
            yield replace(point, workspace=point.workspace + more, heads=-part.head)
        if part.layers > 1:
            below = self._layer((BELOW,)) if self.queued else []
            for point in (*below, *(rows if layer else ())):
                workspace = point.workspace + layer
                yield replace(point, workspace=workspace, sets=-1, heads=-part.head)
        if part.embedding:
            (moment,) = EMBEDDING
            workspace = self._apart(moment)
            yield Point(moment.name, workspace, sets=-part.layers, heads=-part.head)

    def _split(self, part: Part, filler: bool) -> Iterator[Point]:
        """At the topmost layer, and at the lowest one: sets have become states, and states that a
        W in the waits has used up are gone."""
        done = part.layers - 1
        for point, beside in zip(self._layer(SPLIT), self._states(BESIDE), strict=True):
            more = beside.workspace if filler else 0
            top = replace(point, workspace=point.workspace + more, heads=-part.head)
            yield top
            yield replace(top, sets=-done, states=0 if filler else done)

    def _weights(self, part: Part, last: bool) -> Iterator[Point]:
        for point in self._states(WEIGHTS):
            yield point
            if last and part.layers > 1:
                yield replace(point, workspace=point.workspace + self.unit.layer, states=-1)
        if part.embedding:
            (moment,) = EMBEDDING
            workspace = self._apart(moment) - self.unit.stream
            yield Point(moment.name, workspace, states=-part.layers)

    def _fused(self, chunk: int, back: int) -> Iterator[Point]:
        """The forward fills a layer as the backward empties one; a bound, since they drift."""
        forward, backward = self.parts[chunk], self.parts[back]
        sets = max(1 - forward.layers, -backward.layers)
        one = max(self._forward(forward), key=self._more)
        for other in self._joined(backward, last=False):
            if not other.sets:
                name, heads = f"{one.name} beside {other.name}", one.heads + other.heads
                yield Point(name, one.workspace + other.workspace, sets, heads=heads)

    def _layer(self, moments: Iterable[Moment]) -> list[Point]:
        """Their workspaces: without the layer's saved set, which is counted with the others."""
        saved = self.unit.saved
        return [Point(m.name, sum(self.spaces.layer(m).values()) - saved) for m in moments]

    def _states(self, moments: Iterable[Moment]) -> list[Point]:
        return [Point(m.name, self._apart(m) - self.unit.state) for m in moments]

    def _apart(self, moment: Moment) -> int:
        return sum(self.spaces.apart(moment).values())


class _Kept:
    """What is kept at one action of a list."""

    def __init__(self, parts: Mapping[int, Part], unit: Unit) -> None:
        self.parts, self.unit = parts, unit
        #: (chunk, micro-batch) of what is kept from F to B, and from B to W.
        self.saved: set[tuple[int, int]] = set()
        self.states: set[tuple[int, int]] = set()
        #: Receives that are posted and not used yet; what was sent and lives on.
        self.arriving: set[tuple[str, int, int]] = set()
        self.sent = 0

    def begin(self, pair: Sequence[Compute]) -> None:
        for one in pair:
            if one.kind == "F":
                self.saved.add((one.chunk, one.micro_batch))
            what = "activations" if one.kind == "F" else "gradient"
            self.arriving.discard((what, one.chunk, one.micro_batch))

    def at(self, point: Point) -> dict[str, int]:
        unit = self.unit
        heads = sum(self.parts[chunk].head for chunk, _ in self.saved)
        embeddings = sum(self.parts[chunk].embedding for chunk, _ in self.states)
        states = (self._layers(self.states) + point.states) * unit.state
        under_way = {micro_batch for _, micro_batch in self.saved | self.states}
        return {
            "saved activations": (self._layers(self.saved) + point.sets) * unit.saved,
            "saved by the head": (heads + point.heads) * 2 * unit.stream,
            "saved from B to W": states + embeddings * unit.stream,
            "inputs": len(under_way) * unit.inputs,
            "messages": (len(self.arriving) + self.sent) * unit.stream,
            f"workspace: {point.name}": point.workspace,
        }

    def end(self, pair: Sequence[Compute]) -> None:
        for one in pair:
            key = one.chunk, one.micro_batch
            if one.kind in ("B", "BW"):
                self.saved.remove(key)
            if one.kind == "B":
                self.states.add(key)
            elif one.kind == "W":
                self.states.remove(key)

    def _layers(self, keys: Iterable[tuple[int, int]]) -> int:
        return sum(self.parts[chunk].layers for chunk, _ in keys)
