"""Measures the constants by which the planner prices a step: a machine file's, field by field.

Every rank runs the kernels that a training step runs, all ranks at the same time, because cores,
caches and memory are shared in training too. A figure is the median over ranks of each one's median
over repetitions. Kernels take turns on as many sets of operands as no cache holds.

Names and units are those of `megallama.plan.hardware`.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megallama.autograd.attention import attention_backward, attention_forward
from megallama.autograd.linear import linear_dgrad, linear_forward, linear_wgrad
from megallama.autograd.segments import Segments
from megallama.dist.connect import connect
from megallama.dist.group import Group
from megallama.kernels.rms_norm import rms_norm_forward
from megallama.spec.flops import peak_flops
from megallama.train.device import DTYPES, device_name
from megallama.train.failures import explained_loss
from megallama.train.fits import fit_line, fit_rate
from megallama.train.kernel_calls import CPU, CUDA, EPS, Call, Kernels
from megallama.train.meeting import Meeting
from megallama.train.process import Process

#: Two measured times, one above the other's noise: repetitions fill so many seconds.
SECONDS_A_FIGURE = 0.4
#: Times as long as alone that a collective beside products takes at most; above it is noise.
SLOWEST = 10.0
#: Bytes of a gathered tensor from which on none is made larger to outlast a product.
LARGEST_GATHER = 2**30


def calibrate(process: Process, device: torch.device) -> dict[str, Any]:
    """The constants of this machine, alike on every rank.

    Raises LostError where another rank does not answer, or a device fails.
    """
    groups = connect(
        process.store,
        process.rank,
        {"calibrate": range(process.size)},
        device,
        hostname=process.hostname,
    )
    try:
        with torch.no_grad(), explained_loss(process):
            own = Calibration(groups["calibrate"], device).constants()
    finally:
        groups.close()
    meeting = Meeting(process, "calibrate")
    constants = json.loads(meeting.hold(lambda: json.dumps(own), median_of))
    peak = peak_flops(device_name(device)) if device.type == "cuda" else None
    return {
        "device": device.type,
        **constants,
        "gemm": {"peak": peak, **constants["gemm"]},
        "ranks": process.local_size,
        "network": constants["node"],
    }


def median_of(ranks: Sequence[str]) -> str:
    """Each figure's median over the ranks."""

    def merge(values: Sequence[Any]) -> Any:
        if isinstance(values[0], dict):
            return {key: merge([value[key] for value in values]) for key in values[0]}
        return type(values[0])(statistics.median(values))

    return json.dumps(merge([json.loads(rank) for rank in ranks]))


class Calibration:
    """What one rank measures. Ranks start every figure together."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self.group, self.device = group, device
        self.sizes = CUDA if device.type == "cuda" else CPU
        self.kernels = Kernels(self.sizes, device)
        self.copy_rate = self._copy_rate()
        self.kernel_seconds = self._kernel_seconds()

    def constants(self) -> dict[str, Any]:
        gemm, attention = self._gemm(), self._attention()
        shares, link = self._shares(), self._link()
        return {
            "gemm": gemm,
            "attention": attention,
            "memory": {
                "capacity": self._capacity(),
                "bandwidth": self.copy_rate,
                "kernel_seconds": self.kernel_seconds,
                "shares": shares,
            },
            "node": link,
            "contention": self._contention(),
        }

    # Products and attention.

    def _gemm(self) -> dict[str, Any]:
        sizes = self.sizes
        rates: dict[str, float] = {}
        depths: dict[str, float] = {}
        for name, dtype in DTYPES.items():
            times: dict[int, float] = {}
            for depth in (sizes.width // 4, sizes.width // 2, sizes.width, 2 * sizes.width):
                shapes = (sizes.tokens, depth), (sizes.ffn, depth)
                calls = [partial(linear_forward, *each) for each in self._sets(dtype, *shapes)]
                times[depth] = self._seconds(*calls) / (2 * sizes.tokens * sizes.ffn * depth)
            rates[name], depths[name] = fit_rate(times)
        half = depths["bf16"]

        def relative(calls: Sequence[Call], k: int, other: int) -> float:
            flops = 2 * sizes.width * k * other
            return flops * (k + half) / k / rates["bf16"] / self._seconds(*calls)

        of_dy, of_w = (sizes.tokens, 2 * sizes.ffn), (2 * sizes.ffn, sizes.width)
        sets = self._sets(torch.bfloat16, of_dy, of_w, self.kernels.stream)
        dw = torch.zeros(2 * sizes.ffn, sizes.width, device=self.device)
        dgrads = [partial(linear_dgrad, dy, w) for dy, w, _ in sets]
        wgrads = [partial(linear_wgrad, dy, x, dw) for dy, _, x in sets]
        return {
            "flops": rates,
            "depth": half,
            "dgrad": relative(dgrads, 2 * sizes.ffn, sizes.tokens),
            "wgrad": relative(wgrads, sizes.tokens, 2 * sizes.ffn),
        }

    def _attention(self) -> dict[str, float]:
        sizes = self.sizes
        heads = sizes.width // sizes.head_width
        forward: dict[int, float] = {}
        backward: dict[int, float] = {}
        for length in sizes.lengths:
            count = max(1, sizes.tokens // length)
            shape = count * length, heads, sizes.head_width
            segments = Segments((length,) * count)
            forwards, backwards = [], []
            for q, k, v, do, dq, dk, dv in self._sets(torch.bfloat16, *[shape] * 7):
                o, lse = attention_forward(q, k, v, segments)
                forwards.append(partial(attention_forward, q, k, v, segments))
                given = do, (q, k, v), o, lse, segments, (dq, dk, dv)
                backwards.append(partial(attention_backward, *given))
            flops = count * length * length * sizes.width
            forward[length] = self._seconds(*forwards) / (2 * flops)
            backward[length] = self._seconds(*backwards) / (5 * flops)
        rate, half = fit_rate(forward)
        rates = [(1 + half / each) / seconds for each, seconds in backward.items()]
        return {"forward": rate, "backward": statistics.mean(rates), "length": half}

    def _sets(self, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[list[Tensor]]:
        """Operands, as many sets of them as no cache holds: a step's come from memory too."""
        size = dtype.itemsize * sum(math.prod(shape) for shape in shapes)
        return [self.kernels.new(dtype, *shapes) for _ in range(max(2, self.sizes.cache // size))]

    # Memory.

    def _copy_rate(self) -> float:
        source = torch.zeros(self.sizes.cache // 4, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self._seconds(lambda: target.copy_(source))

    def _kernel_seconds(self) -> float:
        x, w = self.kernels.new(torch.bfloat16, (1, 64), (64,))
        return self._seconds(lambda: rms_norm_forward(x, w, EPS, out=x))

    def _capacity(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).total_memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // self.group.size

    def _shares(self) -> dict[str, float]:
        """Of the copy's bandwidth, by the name of the kind of kernel."""
        shares: dict[str, float] = {}
        for name, kind in self.kernels.kinds().items():
            calls = [kind.make() for _ in range(max(2, self.sizes.cache // kind.bytes))]
            whole = self._seconds(*calls)
            # Of operands so small that starting the kernel is all, nothing would be left.
            seconds = max(whole - self.kernel_seconds, whole / 10)
            shares[name] = kind.bytes / seconds / self.copy_rate
        return shares

    # Links.

    def _link(self) -> dict[str, float]:
        """A line through the times of all-gathers and reduce-scatters over what a rank sends; each
        size counts alike.

        Each follows a product, whose time is taken off. Ranks come apart over it and threads fall
        asleep: on two cores a small gather takes 2 ms so, and 0.4 ms right after another.
        """
        product = self._product()
        times: dict[int, float] = {}
        for size in self.sizes.messages:
            (shard,) = self.kernels.new(torch.bfloat16, (size // 2,))
            (whole,) = self.kernels.new(torch.bfloat16, (self.group.size * (size // 2),))

            def step() -> None:
                product()
                self.group.all_gather(shard).wait()  # noqa: B023
                product()
                self.group.reduce_scatter(whole).wait()  # noqa: B023

            alone, both = self._seconds(product), self._seconds(step)
            times[(self.group.size - 1) * size] = max(both / 2 - alone, both / 100)
        start, slope = fit_line(list(times), list(times.values()))
        # On a machine so busy that larger messages took no longer, what was reached at least.
        slope = slope or min(seconds / size for size, seconds in times.items())
        return {"bandwidth": 1 / slope, "start_seconds": start, "hop_seconds": 0.0}

    def _product(self) -> Call:
        sizes = self.sizes
        x, w = self.kernels.new(torch.bfloat16, self.kernels.stream, (sizes.ffn, sizes.width))
        (out,) = self.kernels.new(torch.bfloat16, (sizes.tokens, sizes.ffn))
        return lambda: linear_forward(x, w, out)

    def _contention(self) -> dict[str, float]:
        """How much longer products take while an all-gather is under way, which outlasts them, and
        how much longer it takes for the part of it that is done beside them."""
        product = self._product()
        alone = self._seconds(product)
        shard, flight = self._lasting(2 * alone)
        times = max(1, int(flight / 2 / alone))

        def beside() -> tuple[float, float]:
            self._mean(0.0)  # ranks that start apart would wait for each other in the gather
            began = time.perf_counter()
            handle = self.group.all_gather(shard)
            for _ in range(times):
                product()
            self._finish()
            computed = time.perf_counter() - began
            handle.wait()
            self._finish()  # the next one's products do not queue behind this gather
            rest = time.perf_counter() - began - computed
            return computed / (times * alone), computed / max(flight - rest, computed / SLOWEST)

        slower = zip(*(beside() for _ in range(9)), strict=True)
        compute, collective = (max(0.0, statistics.median(times) - 1) for times in slower)
        return {"compute": compute, "collective": collective}

    def _lasting(self, seconds: float) -> tuple[Tensor, float]:
        """A shard whose all-gather takes so long, and how long it takes; alike on every rank.

        The largest message's where that does, else doubled until it does or is `LARGEST_GATHER`.
        """
        size, least = self.sizes.messages[-1] // 4, self._mean(seconds)
        while True:
            shard = torch.zeros(size, device=self.device)
            flight = self._mean(self._seconds(lambda: self.group.all_gather(shard).wait()))  # noqa: B023
            if flight >= least or self.group.size * shard.nbytes >= LARGEST_GATHER:
                return shard, flight
            size *= 2

    # What the figures have in common.

    def _finish(self) -> None:
        """Wait for this rank's own kernels: a collective that is under way has another stream."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _mean(self, seconds: float) -> float:
        """Over the ranks."""
        own = torch.tensor([seconds], dtype=torch.float64, device=self.device)
        return self.group.all_reduce(own).wait().item() / self.group.size

    def _seconds(self, *calls: Call) -> float:
        """Of one call, the median over stretches of them in turns; every rank makes as many."""
        each = itertools.cycle(calls)
        for _ in range(2 * len(calls)):
            next(each)()
        began = time.perf_counter()
        for _ in calls:
            next(each)()
        self._finish()
        took = self._mean((time.perf_counter() - began) / len(calls))
        stretches = 5
        times = max(1, round(SECONDS_A_FIGURE / stretches / took))
        found = []
        for _ in range(stretches):
            began = time.perf_counter()
            for _ in range(times):
                next(each)()
            self._finish()
            found.append((time.perf_counter() - began) / times)
        return statistics.median(found)
