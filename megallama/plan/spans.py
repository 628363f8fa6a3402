"""What each pipeline rank does in a predicted step, for a timeline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megallama.config.schema import Config
from megallama.plan.hardware import Hardware
from megallama.plan.pipeline import Key, Plan, Times
from megallama.plan.rundown import Rundown
from megallama.spec.grid import make_grid
from megallama.spec.schedules.actions import Fused


class Span(NamedTuple):
    """Something that a pipeline rank does, in seconds from the step's begin.

    `lane`: "compute", or the group whose collective or message it is. `kind`: of a pass (F, B, W,
    BW, FB), else gather, reduce, message, step_sum or optimizer; of a kernel, kernel; of a
    collective in a pass, its operation.
    """

    rank: int
    lane: str
    name: str
    start: float
    end: float
    kind: str


def spans(config: Config, hardware: Hardware, gpus: int) -> list[Span]:
    """A step of a run; those of one rank and lane do not overlap.

    The lanes "kernels" and "tensor" have the inside of each rank's first pass of each kind.

    Raises:
        ConfigError: the layout does not fill the devices.
    """
    rundown = Rundown(config, hardware, make_grid(config, gpus))
    plan = rundown.plan(rundown.micro_batches)
    times = rundown.run(plan)
    found = [*_passes(plan, times), *_inside(rundown, plan, times)]
    found += _messages(rundown, plan, times)
    found += [*_gathers(rundown), *_reductions(rundown, plan, times)]
    return found + list(_end(rundown, max(span.end for span in found)))


def _passes(plan: Plan, times: Times) -> Iterator[Span]:
    for node, start, end in zip(plan.nodes, times.starts, times.ends, strict=True):
        kind = "FB" if isinstance(node.action, Fused) else node.action.kind
        yield Span(node.rank, "compute", str(node.action), start, end, kind)


def _inside(rundown: Rundown, plan: Plan, times: Times) -> Iterator[Span]:
    """Steps of the first pass of each kind, fitted into the time of the pass: layers are alike in
    the prediction and nearly so here."""
    seen: set[tuple[int, Key]] = set()
    for node, start, end in zip(plan.nodes, times.starts, times.ends, strict=True):
        if (node.rank, node.key) in seen:
            continue
        seen.add((node.rank, node.key))
        laps = rundown.laps(node.key)
        scale = (end - start) / max((lap.end for lap in laps), default=1.0)
        for lap in laps:
            lane = "kernels" if lap.stream == "compute" else lap.stream
            kind = "kernel" if lap.stream == "compute" else lap.name
            at = start + scale * lap.start, start + scale * lap.end
            yield Span(node.rank, lane, lap.name, *at, kind)


def _messages(rundown: Rundown, plan: Plan, times: Times) -> Iterator[Span]:
    """From where both ends are there to its arrival."""
    free: dict[tuple[int, int], float] = {}
    for node in plan.nodes:
        for maker, posted in node.takes:
            link = plan.nodes[maker].rank, node.rank
            begin = max(times.ends[maker], times.ends[posted] if posted >= 0 else 0.0)
            end = begin + rundown.latency[link]
            begin = max(begin, free.get(link, 0.0))
            free[link] = max(begin, end)
            if begin < end:
                lane = f"pipeline {link[0]}>{link[1]}"
                yield Span(link[0], lane, f"of {plan.nodes[maker].action}", begin, end, "message")


def _gathers(rundown: Rundown) -> Iterator[Span]:
    """The weights, on their way at the step's begin."""
    if not rundown.ready:
        return
    for rank in range(rundown.grid.pipeline):
        now = 0.0
        for part in rundown.rank_parts(rank):
            for bucket in rundown.end.buckets(part).all:
                begin, now = now, now + rundown.end.seconds(rundown.end.gather(bucket))
                yield Span(rank, "data", "weights", begin, now, "gather")


def _reductions(rundown: Rundown, plan: Plan, times: Times) -> Iterator[Span]:
    for rank, begin, end in rundown.reductions(plan, times):
        yield Span(rank, "data", "gradients", begin, end, "reduce")


def _end(rundown: Rundown, begin: float) -> Iterator[Span]:
    """The sum over all ranks, and each rank's update."""
    for rank in range(rundown.grid.pipeline):
        parts = rundown.rank_parts(rank)
        verdict = begin + rundown.end.sums(parts)
        done = verdict + rundown.end.update(parts)
        yield Span(rank, "world", "sum over all ranks", begin, verdict, "step_sum")
        yield Span(rank, "compute", "AdamW", verdict, done, "optimizer")
