"""What one rank of a pipeline really does in a step: what it holds, sends, receives and runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from torch import Tensor

from megallama.autograd.passes import Pass
from megallama.dist.group import Group
from megallama.dist.handle import Handle
from megallama.train import step
from megallama.train.build import Trainer, build_trainer
from megallama.train.passes import Held, StepPasses
from megallama.train.process import Process
from tests.layouts.case import LR, Case
from tests.layouts.pool import ADDRESS, Seat
from tests.layouts.problem import batch, problem_of, share_of

#: (source, destination), pipeline ranks, and the labels of what went from one to the other.
Labels = dict[tuple[int, int], list[str]]


@dataclass
class Walk:
    """A step of one pipeline rank.

    `sets` and `states`: the most that were held at once, from F to B and from B to W, and the most
    bytes of the layers' tensors in them. `left`: what was still held at the end. `contents`: a
    digest of each message by its label, as it was sent here or had arrived when it was waited for.
    """

    stage: int
    sets: int = 0
    states: int = 0
    saved_bytes: int = 0
    state_bytes: int = 0
    left: int = 0
    sent: Labels = field(default_factory=dict)
    received: Labels = field(default_factory=dict)
    sent_contents: dict[str, bytes] = field(default_factory=dict)
    received_contents: dict[str, bytes] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)


def walk(seat: Seat, case: Case) -> Walk:
    """Run one step on this rank and watch it."""
    trainer = build(seat, case)
    try:
        found = Walk(trainer.place.along("pipeline"))
        for name, group in trainer.groups.by_name.items():
            if name.startswith("pipeline "):
                _listen(group, name, found)
        trainer.groups.recorder.on = True
        share = share_of(batch(problem_of(case), 0), trainer.place.along("data"), case.data)
        with _counting(found) as made:
            trainer.step.run(share, LR)
        (passes,) = made
        found.left = len(passes.saved) + len(passes.kept)
        found.ran = [e.text for e in trainer.groups.recorder.take() if e.lane == "compute"]
        return found
    finally:
        trainer.groups.close()


def build(seat: Seat, case: Case, grad_clip: float = 1.0) -> Trainer:
    """A rank's trainer, in the strict mode."""
    store = seat.store if seat.size > 1 else None
    process = Process(seat.rank, seat.size, seat.rank, seat.size, store, ADDRESS)
    return build_trainer(case.config(grad_clip), process, strict=True)


class _Holder(dict[tuple[int, int], Held]):
    """Held sets; remembers the most that there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0

    def __setitem__(self, key: tuple[int, int], held: Held) -> None:
        super().__setitem__(key, held)
        self.peak = max(self.peak, len(self))

    def layer_bytes(self) -> int:
        """Bytes of the storages that the layers' sets keep alive, each counted once."""
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for held in self.values()
            for key, saved in held.stash._sets.items()
            if isinstance(key, int)  # the others are the embedding's and the head's
            for tensor in saved.values()
        }
        return sum(storages.values())


@contextmanager
def _counting(found: Walk) -> Iterator[list[StepPasses]]:
    """Steps within count what they hold. Yields the passes that they make."""
    made: list[StepPasses] = []

    class Counting(StepPasses):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            self.sets, self.states = _Holder(), _Holder()
            self.saved, self.kept = self.sets, self.states
            made.append(self)

        def forward(self, *given: Any) -> Pass[Tensor | None]:
            return self._looked(super().forward(*given))

        def backward_activations(self, *given: Any) -> Pass[Tensor | None]:
            return self._looked(super().backward_activations(*given))

        def _looked(self, each: Pass[Any]) -> Pass[Any]:
            result = yield from each
            found.sets, found.states = self.sets.peak, self.states.peak
            found.saved_bytes = max(found.saved_bytes, self.sets.layer_bytes())
            found.state_bytes = max(found.state_bytes, self.states.layer_bytes())
            return result

    with mock.patch.object(step, "StepPasses", Counting):
        yield made


@dataclass
class _Heard:
    """A receive's handle; it keeps a digest of what arrived."""

    handle: Handle[Tensor]
    label: str
    contents: dict[str, bytes]

    @property
    def cover(self) -> int:
        return self.handle.cover

    def wait(self) -> Tensor:
        tensor = self.handle.wait()
        self.contents[self.label] = _digest(tensor)
        return tensor


def _listen(group: Group, name: str, found: Walk) -> None:
    """Note what goes through a link."""
    source, destination = map(int, name.removeprefix("pipeline ").split(">"))
    ends = source, destination
    send, receive = group.send, group.receive

    def heard_send(x: Tensor, peer: int, label: str = "") -> Handle[None]:
        found.sent.setdefault(ends, []).append(label)
        found.sent_contents[label] = _digest(x)
        return send(x, peer, label)

    def heard_receive(out: Tensor, peer: int, label: str = "") -> Handle[Tensor]:
        found.received.setdefault(ends, []).append(label)
        return _Heard(receive(out, peer, label), label, found.received_contents)

    group.send, group.receive = heard_send, heard_receive  # type: ignore[method-assign]


def _digest(tensor: Tensor) -> bytes:
    return hashlib.blake2b(tensor.contiguous().numpy().tobytes(), digest_size=16).digest()
