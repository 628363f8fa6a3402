"""One run on one machine: its pipeline, its passes' times, and when each rank does what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from megallama.config.schema import Config
from megallama.plan.chunk import Part
from megallama.plan.costs import message_seconds
from megallama.plan.hardware import Hardware
from megallama.plan.passtimes import pass_times
from megallama.plan.pipeline import Key, Plan, Times, few_micro_batches, period, plan_of
from megallama.plan.shape import shape_of
from megallama.plan.stepend import Bucket, StepEnd
from megallama.plan.streams import Lap, Timing
from megallama.spec.grid import Grid
from megallama.spec.stages import chunks_of


@dataclass(frozen=True)
class Ends:
    """When all passes of a step are done, and when the data ranks' sums of gradients are."""

    passes: float
    gradients: float

    def beyond(self, later: Ends, times: float) -> Ends:
        """`times` further steps from this one to the `later` one."""
        return Ends(
            self.passes + times * (later.passes - self.passes),
            self.gradients + times * (later.gradients - self.gradients),
        )


class Rundown:
    """The parts that a prediction is added up from, each worked out when it is first asked for."""

    def __init__(self, config: Config, hardware: Hardware, grid: Grid) -> None:
        self.config, self.hardware, self.grid = config, hardware, grid
        self.shape = shape_of(config, hardware.device)
        self.times = pass_times(hardware, config.train.precision)
        self.end = StepEnd(config, grid, self.times.costs)
        chunks = chunks_of(config, grid)
        self.parts = [Part(len(c.layers), c.embedding, c.head) for c in chunks]
        train, parallel = config.train, config.parallel
        self.micro_batches = train.global_batch // (train.micro_batch * grid.data)
        self._landings: dict[Part, list[tuple[float, float]]] = {}
        self.fills = parallel.overlap != "none" and grid.tensor > 1

    def plan(self, micro_batches: int) -> Plan:
        parallel = self.config.parallel
        name, stages, chunks = parallel.schedule, self.grid.pipeline, parallel.chunks_per_rank
        return plan_of(name, stages, micro_batches, chunks, self.fills)

    @cached_property
    def plans(self) -> tuple[Plan, Plan, int]:
        """Of few micro-batches, of a period more, and how many periods the run has beyond."""
        parallel, grid = self.config.parallel, self.grid
        named = parallel.schedule, grid.pipeline
        few = few_micro_batches(*named, self.micro_batches)
        each = period(*named)
        plan, beyond = self.plan(few), (self.micro_batches - few) // each
        return plan, self.plan(few + each) if beyond else plan, beyond

    @cached_property
    def timings(self) -> Mapping[Key, Timing]:
        """Of every kind of pass that the schedule has."""
        keys = {key for plan in self.plans[:2] for work in plan.work for key in work}
        return {key: self._timing(key) for key in keys}

    def _timing(self, key: Key) -> Timing:
        kind, first, second = key
        return self.times.timing(self.shape, kind, self.parts[first], self.parts[second])

    def laps(self, key: Key) -> list[Lap]:
        """The steps of a pass, from its begin."""
        kind, first, second = key
        return self.times.laps(self.shape, kind, self.parts[first], self.parts[second])

    @cached_property
    def seconds(self) -> Mapping[Key, float]:
        return {key: timing.seconds for key, timing in self.timings.items()}

    @cached_property
    def latency(self) -> Mapping[tuple[int, int], float]:
        """Of a message, by pipeline ranks: those of tensor rank 0 of the first data rank."""
        size, stride = self.shape.stream(self.shape.rows), self.grid.tensor * self.grid.data
        plan = self.plans[0]
        return {
            (a, b): message_seconds(self.hardware, size, a * stride, b * stride)
            for a, b in plan.links
        }

    def work(self, rank: int) -> Timing:
        """All passes of a pipeline rank."""
        few, more, beyond = self.plans
        total = Timing(0.0, 0.0)
        for key, timing in self.timings.items():
            count = few.work[rank].get(key, 0)
            count += beyond * (more.work[rank].get(key, 0) - count)
            total += float(count) * timing
        return total

    def ends(self, latency: bool = True, data: bool = True) -> Ends:
        """Of the step, by the steady state's period; without messages' latency or the data ranks'
        collectives where these are not asked for."""
        few, more, beyond = self.plans
        first = self._ends(few, latency, data)
        return first.beyond(self._ends(more, latency, data), beyond) if beyond else first

    def run(self, plan: Plan, latency: bool = True, data: bool = True) -> Times:
        delays = self.latency if latency else 0.0
        if not data:
            return plan.run(self.seconds, delays)
        return plan.run(self.seconds, delays, self.ready, self.late)

    def _ends(self, plan: Plan, latency: bool, data: bool) -> Ends:
        times = self.run(plan, latency, data)
        passes = plan.makespan(times)
        reduced = (end for _, _, end in self.reductions(plan, times) if data)
        return Ends(passes, max(passes, max(reduced, default=0.0)))

    @property
    def exchanges(self) -> bool:
        """Whether there are data ranks to add gradients with."""
        return self.grid.data > 1

    @cached_property
    def ready(self) -> Mapping[int, tuple[float, float]]:
        """Of each chunk: the earliest end of its first forward, whose weights arrive bucket by
        bucket under it, and the seconds by which that contention makes it slower."""
        if not self.exchanges or self.shape.blocks:
            return {}
        found: dict[int, tuple[float, float]] = {}
        slower = self.hardware.contention.compute
        owners = self.plans[0].schedule.owners
        for rank in range(self.grid.pipeline):
            now = 0.0
            for chunk in (c for c, owner in enumerate(owners) if owner == rank):
                begin, buckets = now, self.end.buckets(self.parts[chunk])
                forward = self._timing(("F", chunk, chunk)).seconds
                floor, count = 0.0, len(buckets.all)
                for place, bucket in enumerate(buckets.all):
                    now = self._beside(self.end.seconds(self.end.gather(bucket)), now, forward)
                    floor = max(floor, now + forward * (1 - place / count))
                beside = min(forward, now - begin) if not begin else 0.0
                found[chunk] = floor, beside * slower / (1 + slower)
        return found

    @cached_property
    def late(self) -> Mapping[int, float]:
        """Of each chunk: the seconds by which its last backward, or W, is slower under the sums of
        its gradients."""
        if not self.exchanges or self.shape.blocks:
            return {}
        found: dict[int, float] = {}
        slower = self.hardware.contention.compute
        for (kind, chunk, other), timing in self.timings.items():
            last = other if kind in ("FB", "W-") else chunk
            if kind in ("BW", "W", "W-", "FB"):
                under = sum(seconds for _, seconds in self._landed(self.parts[last]))
                under *= 1 + self.hardware.contention.collective
                beside = min(timing.seconds, under) * slower / (1 + slower)
                found[last] = max(found.get(last, 0.0), beside)
        return found

    @property
    def blocked_seconds(self) -> float:
        """Where every collective is waited for where it is started: the weights' on their way."""
        if not self.exchanges or not self.shape.blocks:
            return 0.0
        return max(
            sum(
                self.end.seconds(self.end.gather(bucket))
                for part in self.rank_parts(rank)
                for bucket in self.end.buckets(part).all
            )
            for rank in range(self.grid.pipeline)
        )

    def reductions(self, plan: Plan, times: Times) -> Iterator[tuple[int, float, float]]:
        """Rank, begin and end of every sum of a bucket's gradients. A bucket leaves when it is
        complete, in the last backward of its chunk, one after the other."""
        if not self.exchanges:
            return
        free = [0.0] * self.grid.pipeline
        for index in plan.closing:
            node = plan.nodes[index]
            begin, end = times.starts[index], times.ends[index]
            if self.shape.blocks:
                begin = end  # one stops the pass after the other, which comes to the same
            for at, seconds in self._landed(self.parts[node.closes]):
                start = max(free[node.rank], begin + (end - begin) * at)
                free[node.rank] = self._beside(seconds, start, end)
                yield node.rank, start, free[node.rank]

    def _beside(self, seconds: float, start: float, until: float) -> float:
        """When a collective of so many seconds is done, with kernels beside it until then."""
        slower, beside = 1 + self.hardware.contention.collective, max(0.0, until - start)
        return start + min(seconds * slower, seconds + beside * (1 - 1 / slower))

    def _landed(self, part: Part) -> list[tuple[float, float]]:
        """Of each of a chunk's buckets, the share of the last backward after which it is complete,
        and the seconds of its sum: the output's before the backward begins, a layer's when the next
        one's first gradients are made."""
        found = self._landings.get(part)
        if found is None:
            buckets = self.end.buckets(part)
            layer, ends = self._reduce_seconds(buckets.layer), self._reduce_seconds(buckets.ends)
            found = [] if buckets.output is None else [(0.0, self._reduce_seconds(buckets.output))]
            for place in range(1, buckets.layers + 1):
                found.append((min(1.0, (place + 0.25) / buckets.layers), layer))
            found.append((1.0, ends))
            self._landings[part] = found
        return found

    def _reduce_seconds(self, bucket: Bucket) -> float:
        return self.end.seconds(self.end.reduce(bucket))

    def rank_parts(self, rank: int) -> list[Part]:
        owners = self.plans[0].schedule.owners
        return [part for part, owner in zip(self.parts, owners, strict=True) if owner == rank]
