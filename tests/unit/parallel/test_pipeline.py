"""The interpreter, on passes that are no model: they say what they were given, and when."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from megallama.autograd.passes import Pass, WgradQueue
from megallama.config.schedules import default_virtual_stages
from megallama.dist.handle import Done
from megallama.dist.recorder import Recorder
from megallama.parallel.pipeline import Pipeline
from megallama.spec.schedules.actions import Compute, Fused, Reduce, Schedule, Send, Step, passes
from megallama.spec.schedules.build import NAMES, make_schedule
from megallama.spec.schedules.promises import peak_in_flight, peak_weight_states

STAGES, MICRO_BATCHES = 3, 7


class Wire:
    """A link between two threads: the k-th send meets the k-th receive, as on a group's thread."""

    def __init__(self) -> None:
        self._sent: list[tuple[Tensor, str]] = []
        self._received = 0
        self._changed = threading.Condition()

    def send(self, x: Tensor, peer: int, label: str = "") -> Done[None]:
        assert peer == 1
        with self._changed:
            self._sent.append((x.clone(), label))
            self._changed.notify_all()
        return Done(None)

    def receive(self, out: Tensor, peer: int, label: str = "") -> Arriving:
        assert peer == 0
        self._received += 1
        return Arriving(self, self._received - 1, out, label)

    def message(self, number: int) -> tuple[Tensor, str]:
        """One that never comes fails the test."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._sent) > number, timeout=20)
        return self._sent[number]


@dataclass
class Arriving:
    wire: Wire
    number: int
    out: Tensor
    label: str
    cover: int = 0

    def wait(self) -> Tensor:
        sent, label = self.wire.message(self.number)
        assert label == self.label
        return self.out.copy_(sent)


class Traced:
    """Passes over a number: a forward of chunk c takes x to 10·x + c, a backward likewise."""

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self.last = schedule.chunks - 1
        self.log: list[Any] = []
        self.alive: dict[str, set[tuple[int, int]]] = {"F": set(), "B": set()}
        self.peak = {"F": 0, "B": 0}
        self.out: dict[tuple[str, int], float] = {}

    def forward(self, chunk: int, micro_batch: int, x: Tensor | None) -> Pass[Tensor | None]:
        assert (x is None) == (chunk == 0)
        self._keep("F", chunk, micro_batch)
        yield Done(None)
        self.log.append(Compute("F", chunk, micro_batch))
        return self._through("F", chunk, micro_batch, x, chunk == self.last)

    def backward(
        self, chunk: int, micro_batch: int, dz: Tensor | None, queue: WgradQueue
    ) -> Pass[Tensor | None]:
        assert (dz is None) == (chunk == self.last)
        yield Done(None)
        one = Compute("BW", chunk, micro_batch)
        queue.defer(lambda: self.log.append(one))
        self.alive["F"].remove((chunk, micro_batch))
        return self._through("B", chunk, micro_batch, dz, chunk == 0)

    def backward_activations(
        self, chunk: int, micro_batch: int, dz: Tensor | None
    ) -> Pass[Tensor | None]:
        self._keep("B", chunk, micro_batch)
        yield Done(None)
        self.log.append(Compute("B", chunk, micro_batch))
        self.alive["F"].remove((chunk, micro_batch))
        return self._through("B", chunk, micro_batch, dz, chunk == 0)

    def backward_weights(self, chunk: int, micro_batch: int) -> Pass[None]:
        yield Done(None)
        self.log.append(Compute("W", chunk, micro_batch))
        self.alive["B"].remove((chunk, micro_batch))

    def buffer(self) -> Tensor:
        return torch.empty(1, dtype=torch.float64)

    def reduce(self, chunk: int) -> None:
        self.log.append(Reduce(chunk))

    def step(self) -> None:
        self.log.append(Step())

    def _keep(self, kind: str, chunk: int, micro_batch: int) -> None:
        self.alive[kind].add((chunk, micro_batch))
        self.peak[kind] = max(self.peak[kind], len(self.alive[kind]))

    def _through(
        self, kind: str, chunk: int, micro_batch: int, x: Tensor | None, ends: bool
    ) -> Tensor | None:
        start = torch.tensor([1.0 + micro_batch], dtype=torch.float64)
        result = 10 * (start if x is None else x) + chunk
        if ends:
            self.out[kind, micro_batch] = result.item()
        return None if ends else result


def in_threads(bodies: list[Callable[[], None]]) -> None:
    """Run them side by side; raise what one raised."""
    errors: list[BaseException] = []

    def caught(body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=caught, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def through(start: float, chunks: Iterator[int] | range) -> float:
    for chunk in chunks:
        start = 10 * start + chunk
    return start


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stages", [1, 2, STAGES])
def test_a_list_is_run_as_it_stands(name, stages):
    """Every pass in the list's order, on what the chunk before it made; the list's peaks."""
    schedule = make_schedule(name, stages, MICRO_BATCHES, default_virtual_stages(name))
    wires = {link: Wire() for link in schedule.links}
    traced = [Traced(schedule, rank) for rank in range(stages)]
    in_threads(
        [lambda r=rank: Pipeline(schedule, r, wires).run(traced[r]) for rank in range(stages)]
    )
    out = {key: value for each in traced for key, value in each.out.items()}
    for i in range(MICRO_BATCHES):
        assert out["F", i] == through(1.0 + i, range(schedule.chunks))
        assert out["B", i] == through(1.0 + i, range(schedule.chunks - 1, -1, -1))
    for actions, each in zip(schedule.actions, traced, strict=True):
        rest = [a for a in actions if isinstance(a, Compute | Fused | Reduce | Step)]
        expected = [p for a in rest for p in (passes([a]) or (a,))]
        assert each.log == expected
        assert each.peak == {"F": peak_in_flight(actions), "B": peak_weight_states(actions)}
        assert not any(each.alive.values())


class InTurns(Traced):
    """Split passes of three collectives each."""

    def backward_activations(
        self, chunk: int, micro_batch: int, dz: Tensor | None
    ) -> Pass[Tensor | None]:
        for part in range(3):
            self.log.append(f"B{micro_batch}.{part}")
            yield Done(None, cover=1)
        return (yield from super().backward_activations(chunk, micro_batch, dz))

    def backward_weights(self, chunk: int, micro_batch: int) -> Pass[None]:
        for part in range(3):
            self.log.append(f"W{micro_batch}.{part}")
            yield Done(None, cover=1)
        yield from super().backward_weights(chunk, micro_batch)


@pytest.mark.parametrize("fill", [False, True])
def test_the_next_weights_run_in_the_waits_of_a_lone_backward(fill):
    """Rank 1 of ZB-H1 runs W one micro-batch behind B. With `fill` they take turns; the gradient
    leaves after B all the same."""
    schedule = make_schedule("zb-h1", 2, 3)
    wires = {link: Wire() for link in schedule.links}
    turns = InTurns(schedule, 1)

    class Noted(Wire):
        def send(self, x: Tensor, peer: int, label: str = "") -> Done[None]:
            turns.log.append(label)
            return super().send(x, peer, label)

    wires[1, 0] = Noted()
    others = Traced(schedule, 0)
    in_threads(
        [
            lambda: Pipeline(schedule, 0, wires).run(others),
            lambda: Pipeline(schedule, 1, wires, fill=fill).run(turns),
        ]
    )
    first = turns.log.index("B1.0")
    weights = [Compute("W", 1, 0)]
    parts = [f"{kind}.{part}" for part in range(3) for kind in ("B1", "W0")]
    alone = [f"B1.{part}" for part in range(3)]
    done = [Compute("B", 1, 1), "gradient of B(1, 1)"]
    expected = (
        [*parts, *done, *weights]
        if fill
        else [*alone, *done, *(f"W0.{part}" for part in range(3)), *weights]
    )
    assert turns.log[first : first + len(expected)] == expected


def test_what_ran_is_recorded_in_order_with_its_kind():
    schedule = make_schedule("1f1b-fused", 1, 3)
    recorder = Recorder()
    recorder.on = True
    Pipeline(schedule, 0, {}, recorder=recorder).run(Traced(schedule, 0))
    events = recorder.take()
    assert [event.kind for event in events] == ["F", "FB", "FB", "BW", "reduce", "step"]
    assert all(a.end <= b.begin for a, b in pairwise(events))
    assert events[1].text == "F(0, 1)+BW(0, 0)"


def test_an_error_of_a_message_ends_the_run():
    schedule = make_schedule("1f1b", 2, 2)

    class Broken(Wire):
        def receive(self, out: Tensor, peer: int, label: str = "") -> Any:
            raise ConnectionError(label)

    wires = {link: Broken() for link in schedule.links}
    sends = [action for action in schedule.actions[0] if isinstance(action, Send)]
    with pytest.raises(ConnectionError, match=r"activations of F\(0, 0\)"):
        Pipeline(schedule, 1, wires).run(Traced(schedule, 1))
    assert sends[0].label == "activations of F(0, 0)"
