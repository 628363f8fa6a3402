"""What a layout needs and takes at least: what a search drops before it asks for exact figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, islice
from operator import add

import numpy as np
from numpy.typing import NDArray

from megallama.config.schema import Model, Parallel
from megallama.plan.chunk import Part
from megallama.plan.hardware import Hardware
from megallama.plan.layouts import Layout
from megallama.plan.passtimes import pass_times
from megallama.plan.shape import shape_of
from megallama.spec.memory import ITEMSIZE
from megallama.spec.parameters import parameter_table
from megallama.spec.saved import saved_bytes, weight_state_bytes
from megallama.spec.schedules.actions import Action, Fused, passes
from megallama.spec.schedules.build import chunk_owners, make_schedule
from megallama.spec.stages import layer_counts

#: Micro-batches of a list, in pipeline ranks, with which its ranks hold most of what they ever do.
ENOUGH = 2

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Least:
    """Bytes of the rank that needs the most by this bound, and that pipeline rank."""

    bytes: int
    rank: int


def least_bytes(layout: Layout) -> Least:
    """A lower bound of what a rank holds: the state of its layers, and what they keep.

    Left out are the ends of the model, workspaces and messages.
    """
    config, tensor = layout.config, layout.tensor
    model, train, parallel = config.model, config.train, config.parallel
    itemsize = ITEMSIZE[train.precision]
    wide = max(itemsize, 4)
    owned = 2 * wide + (wide if itemsize < wide else 0)
    layer = _layer_elements(model) / tensor * (itemsize + wide + owned / layout.data)
    tokens = layout.micro_batch * train.sequence_length
    shape = itemsize, tokens, tensor, parallel.sequence_parallel
    saved, state = saved_bytes(model, layout.policy, *shape), weight_state_bytes(model, *shape)
    micro_batches = min(_micro_batches(layout), ENOUGH * layout.pipeline)
    counts = _layers(layout)
    rows = _kept(layout.schedule, layout.pipeline, micro_batches, layout.virtual_stages, counts)
    sizes = rows[:, 1:] @ np.array([layer, saved, state])
    worst = int(sizes.argmax())
    return Least(int(sizes[worst]), int(rows[worst, 0]))


def roughly_least_seconds(layout: Layout, hardware: Hardware) -> float:
    """A lower bound of a step's time from one layer's kernels alone; see `least_seconds`."""
    times = pass_times(hardware, layout.config.train.precision)
    shape, layer = shape_of(layout.config, hardware.device), Part(1, False, False)
    forward, backward = (times.timing(shape, kind, layer, layer).compute for kind in ("F", "BW"))
    counts = _layers(layout)
    around = forward if layout.schedule.startswith("zb") else forward + backward
    each = _micro_batches(layout) * (forward + backward)
    work = [each * n for n in _layers_by_rank(layout)]
    before = accumulate((around * n for n in counts[: layout.pipeline - 1]), initial=0.0)
    return max(map(add, before, work))


def least_seconds(layout: Layout, hardware: Hardware) -> float:
    """A lower bound of a step's time, without the data ranks and the optimizer.

    A rank has to wait for the first micro-batch to come down to it, runs its own passes of all, and
    after its last backward the ranks before it still have theirs; a W may lie under that. What
    passes of different micro-batches hide for each other is taken to be everything.
    """
    times = pass_times(hardware, layout.config.train.precision)
    shape, counts = shape_of(layout.config, hardware.device), _layers(layout)
    last = len(counts) - 1
    parts = [Part(n, chunk == 0, chunk == last) for chunk, n in enumerate(counts)]
    known = {
        part: [times.timing(shape, kind, part, part) for kind in ("F", "BW")] for part in set(parts)
    }
    delays = layout.schedule.startswith("zb")
    hides = (delays or layout.schedule.endswith("-fused")) and not shape.blocks
    work = [0.0] * layout.pipeline
    for part, owner in zip(parts, _owners(layout), strict=True):
        both = (timing.compute if hides else timing.seconds for timing in known[part])
        work[owner] += _micro_batches(layout) * sum(both)
    around = (known[p][0].seconds + (0.0 if delays else known[p][1].seconds) for p in parts)
    before = accumulate(islice(around, layout.pipeline - 1), initial=0.0)
    return max(map(add, before, work))


def _owners(layout: Layout) -> tuple[int, ...]:
    return chunk_owners(layout.schedule, layout.pipeline, layout.virtual_stages)


def _layers_by_rank(layout: Layout) -> list[int]:
    found = [0] * layout.pipeline
    for owner, count in zip(_owners(layout), _layers(layout), strict=True):
        found[owner] += count
    return found


def _micro_batches(layout: Layout) -> int:
    return layout.config.train.global_batch // (layout.micro_batch * layout.data)


def _layers(layout: Layout) -> tuple[int, ...]:
    config, chunks = layout.config, layout.pipeline * layout.virtual_stages
    split = config.parallel.stage_layers
    if not isinstance(split, str):
        return split
    return _split(config.model, split, chunks, config.train.sequence_length)


@lru_cache(maxsize=4096)
def _split(model: Model, split: str, chunks: int, length: int) -> tuple[int, ...]:
    return layer_counts(model, Parallel.model_construct(stage_layers=split), chunks, length)


@lru_cache(maxsize=64)
def _layer_elements(model: Model) -> int:
    few = parameter_table(model.model_copy(update={"layers": 1}))
    return sum(parameter.numel for parameter in few if parameter.layer == 0)


@lru_cache(maxsize=4096)
def _kept(
    schedule: str, stages: int, micro_batches: int, chunks: int, counts: tuple[int, ...]
) -> Integers:
    """Rows of (rank, its layers, layers' sets from F to B, from B to W): every moment of every rank
    that no other moment of the rank exceeds in both."""
    made = make_schedule(schedule, stages, micro_batches, chunks)
    rows = []
    for rank, actions in enumerate(made.actions):
        own = {chunk: counts[chunk] for chunk in made.chunks_of(rank)}
        rows += [(rank, sum(own.values()), *pair) for pair in _moments(actions, own)]
    return np.array(rows, dtype=np.int64)


def _moments(actions: Sequence[Action], layers: Mapping[int, int]) -> list[tuple[int, int]]:
    """As in `spec.memory.peak_layers`, of both kinds at the same moment, but between actions: in a
    fused one the forward fills a layer as the backward empties one."""
    sets = states = 0
    found = {(0, 0)}
    for action in actions:
        fused = isinstance(action, Fused)
        for one in passes((action,)):
            size = layers[one.chunk]
            sets += size if one.kind == "F" else 0
            if not fused:
                found.add((sets, states))
            sets -= size if one.kind in ("B", "BW") else 0
            states += {"B": size, "W": -size}.get(one.kind, 0)
        found.add((sets, states))
    return [a for a in found if not any(a != b and a[0] <= b[0] and a[1] <= b[1] for b in found)]
