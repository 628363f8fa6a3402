"""One rank's program: the real build and the real step, on tensors without values.

What the ranks read at a step's end decides how it goes on, and all read the same sum. So a step is
rehearsed for each way that it can go: applied, and left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch

from megallama.check.group import Answer, AnsweringGroup, NotingGroup
from megallama.check.program import Book, Log, Operation, issued
from megallama.check.replay import ReplayingPipeline
from megallama.config.schema import Config
from megallama.data.dataset import Batch
from megallama.dist.connect import Groups
from megallama.dist.group import Group, SingleGroup
from megallama.dist.traffic import Traffic
from megallama.spec.collectives import Count
from megallama.spec.grid import Place
from megallama.spec.groups import group_members, run_schedule
from megallama.spec.replicas import comparison_traffic
from megallama.spec.traffic import REQUESTS, step_traffic
from megallama.train.build import Trainer, assemble
from megallama.train.replicas import Replicas
from megallama.train.tally import Request

#: What a step's sum comes to, element by element: a number of valid tokens so large that the norm
#: of gradients is far below any clipping, and an early update is kept; or no valid token.
APPLIED, LEFT_OUT = 1e12, 0.0
#: Requests of the training loop beside the comparison of replicas: none is made.
OTHERS = (False,) * (REQUESTS - 1)
META = torch.device("meta")


@dataclass(frozen=True)
class Step:
    """A step of a rehearsal: what its sum comes to, and what is logged and compared in it."""

    name: str
    told: float
    compares: bool
    layer_norms: bool = False

    def said(self, config: Config, place: Place, device: str) -> Mapping[tuple[str, str], Count]:
        """What the rank at `place` sends by `spec.traffic`."""
        left_out = 2 if config.parallel.early_step else 0  # an early update is taken back
        updates = 1 if self.told else left_out
        total = step_traffic(config, place, device, layer_norms=self.layer_norms, updates=updates)
        return (total + comparison_traffic(config, place) if self.compares else total).counts


def steps_of(config: Config) -> list[Step]:
    """The steps to rehearse. The first finds the initial weights on their way, the second those of
    the first, the one after a step that is left out none."""
    every = config.train.check_replicas_every
    usual = every == 1
    steps = [
        Step("step 1", APPLIED, usual),
        Step("step 2", APPLIED, usual),
        Step("a step that is left out", LEFT_OUT, usual),
        Step("a step after one that was left out", APPLIED, usual),
    ]
    if every > 1:
        steps.append(Step("a step that compares replicas", APPLIED, True))
    if config.log.layer_norms_every:
        steps.append(Step("a step with layer norms", APPLIED, usual, layer_norms=True))
    return steps


@dataclass(frozen=True)
class Rehearsal:
    """What one rank did. `members`: of each of its groups. `marks`: where in its program the build
    ended, and each step. `bytes_held`: what it has, and keeps at most, by the ledger's names.
    `owned`: of each parameter, how many elements are this rank's own."""

    place: Place
    members: Mapping[str, tuple[int, ...]]
    log: Log
    marks: Mapping[str, int]
    bytes_held: Mapping[str, int]
    owned: Mapping[str, int]

    def part(self, name: str) -> Sequence[int]:
        """The events of a step, or of the build."""
        names = list(self.marks)
        index = names.index(name)
        begin = self.marks[names[index - 1]] if index else 0
        return self.log.events[begin : self.marks[name]]

    def sent(self, name: str) -> dict[tuple[str, str], Count]:
        """Calls and bytes of a step, by group and operation, as `dist.traffic` counts them."""
        calls, sizes = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
        for number, times in Counter(self.part(name)).items():
            if number >= 0:
                operation = self.log.book.operations[number]
                calls[operation.group, operation.kind] += times
                sizes[operation.group, operation.kind] += times * operation.sent
        return {key: Count(count, sizes[key]) for key, count in calls.items()}

    @property
    def forgotten(self) -> Operation | None:
        """The first operation that was never waited for; those of the last step may still be."""
        begin = list(self.marks.values())[-2]
        waited = {-1 - event for event in self.log.events if event < 0}
        for place, operation in enumerate(issued(self.log.book, self.log.events[:begin])):
            if place not in waited:
                return operation
        return None


@dataclass(frozen=True)
class How:
    """`plant` may change a rank's trainer before its first step; `everything`: run every pass, and
    replay none; `steps`: only the first so many."""

    plant: Callable[[Trainer], None] | None = None
    everything: bool = False
    steps: int | None = None


def rehearse(config: Config, place: Place, book: Book, how: How | None = None) -> Rehearsal:
    """Build the rank at `place` and run `steps_of` the config.

    Raises:
        ConfigError: the config cannot be laid out like this.
    """
    how, log, told = how or How(), Log(book), [APPLIED]
    schedule = run_schedule(config, place.grid)
    members = group_members(config, place, schedule.links)
    groups = _groups(
        place.rank, members, log, lambda x: torch.full(x.shape, told[0], dtype=x.dtype)
    )
    trainer = assemble(config, place, META, Groups(groups, Traffic()))
    log.names = names_of(trainer)
    if how.plant is not None:
        how.plant(trainer)
    pipeline = trainer.step.pipelines.train(schedule.micro_batches)
    replaying: Any = ReplayingPipeline(pipeline, trainer.zero, log, how.everything)
    trainer.step.pipelines = replace(trainer.step.pipelines, train=lambda _: replaying)
    replicas, batch = Replicas(trainer), _batch(config, place)
    marks = {"build": len(log.events)}
    for step in steps_of(config)[: how.steps]:
        told[0], compares = step.told, step.compares

        def requests(compares: bool = compares) -> Sequence[Request]:
            return (compares and replicas.compare(), *OTHERS)

        trainer.step.run(batch, config.optimizer.lr, step.layer_norms, requests)
        marks[step.name] = len(log.events)
    sets, states = (each.peak() for each in replaying.kept)
    kept = {"saved activations": sets, "saved from B to W": states}
    return Rehearsal(place, members, log, marks, _state_bytes(trainer) | kept, _owned(trainer))


def _groups(
    rank: int, members: Mapping[str, tuple[int, ...]], log: Log, answer: Answer
) -> dict[str, Group]:
    """Groups as `dist.connect` makes them; what the world's sums come to is told."""

    def group(name: str, ranks: tuple[int, ...]) -> Group:
        told = answer if name == "world" else None
        if len(ranks) > 1:
            return NotingGroup(name, ranks.index(rank), len(ranks), log, told)
        return SingleGroup(name) if told is None else AnsweringGroup(name, told)

    return {name: group(name, ranks) for name, ranks in sorted(members.items())}


def _batch(config: Config, place: Place) -> Batch:
    """A data rank's samples, as many as a step takes: their values are nowhere looked at."""
    count = config.train.global_batch // place.grid.data
    tokens = np.zeros((count, config.train.sequence_length), dtype=np.int64)
    return Batch(tokens, tokens, np.zeros(count, dtype=np.int64), None)


def names_of(trainer: Trainer) -> dict[int, str]:
    """The parameter of each tensor that data ranks share by rows, by its `id`."""
    state = trainer.model.state
    shared = (state.padded_weights, state.padded_gradients)
    return {id(tensor): name for tensors in shared for name, tensor in tensors.items()}


def _state_bytes(trainer: Trainer) -> dict[str, int]:
    """What a rank has all the time, by the names of `spec.memory`."""
    optimizer, early = trainer.optimizer, trainer.step.early
    sizes = trainer.model.state.bytes_held()
    moments = (*optimizer.exp_avg.values(), *optimizer.exp_avg_sq.values())
    sizes["moments"] = sum(tensor.nbytes for tensor in moments)
    if early is not None:
        sizes["kept for early_step"] = early.bytes_held()
    return sizes


def _owned(trainer: Trainer) -> dict[str, int]:
    """Of each parameter, the elements that nobody else owns."""
    return {
        shard.name: sum(prod(piece.shape) for piece in shard.own_pieces if piece.owned)
        for shard in trainer.model.state.table
    }
