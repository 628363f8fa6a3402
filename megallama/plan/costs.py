"""Seconds of one step of a pass on a machine, alone."""

from __future__ import annotations

from math import log2

from megallama.plan.hardware import Hardware
from megallama.plan.ops import Attend, Collective, Compute, Gemm

#: Rows and columns of a product that a multiprocessor works on at a time (cuBLAS's largest for
#: 16-bit operands on A100 and H100).
TILE = 128 * 256


class Costs:
    """What kernels and collectives take. `precision`: of the passes, as in the config."""

    def __init__(self, hardware: Hardware, precision: str) -> None:
        self.hardware = hardware
        self.flops: float = getattr(hardware.gemm.flops, precision)
        self._known: dict[Compute | Collective, float] = {}

    def compute(self, op: Compute) -> float:
        seconds = self._known.get(op)
        if seconds is None:
            seconds = self._known[op] = self._compute(op)
        return seconds

    def collective(self, op: Collective, stride: int = 1) -> float:
        """`stride`: from one of its ranks to the next, on the grid."""
        return collective_seconds(self.hardware, op, stride)

    def _compute(self, op: Compute) -> float:
        memory = self.hardware.memory
        if isinstance(op, Gemm):
            seconds = max(self._product(op), op.bytes / memory.bandwidth)
            if op.phase == "wgrad":
                added = 2 * max(op.itemsize, 4) * op.m * op.n * op.count
                seconds += self.hardware.gemm.addition * added / memory.bandwidth
            return memory.kernel_seconds + seconds
        if isinstance(op, Attend):
            return memory.kernel_seconds + self._attention(op)
        share: float = getattr(memory.shares, op.share)
        return memory.kernel_seconds + op.bytes / (memory.bandwidth * share)

    def _product(self, op: Gemm) -> float:
        """Tiles are dealt out to the multiprocessors in waves, of which the last is not full: on
        average a share of one wave, `tail`, is lost. A tile's pipeline is filled and emptied once
        for its depth k."""
        gemm = self.hardware.gemm
        rate = self.flops * {"forward": 1.0, "dgrad": gemm.dgrad, "wgrad": gemm.wgrad}[op.phase]
        if gemm.units > 1:
            waves = max(1.0, op.m * op.n * op.count / TILE / gemm.units)
            rate *= waves / (waves + gemm.tail)
        return op.flops / rate * (op.k + gemm.depth) / op.k

    def _attention(self, op: Attend) -> float:
        attention = self.hardware.attention
        rate = attention.forward if op.phase == "forward" else attention.backward
        # Rates are of 16-bit operands; other types are slower as their products are.
        rate *= self.flops / self.hardware.gemm.flops.bf16
        return op.flops / rate * (op.length + attention.length) / op.length


def collective_seconds(hardware: Hardware, op: Collective, stride: int = 1) -> float:
    """A ring's time: the bytes that a rank sends at the bus bandwidth, and its steps' latency; an
    all-reduce takes a tree's latency where that is less.

    A group that spans nodes has as many network links into each as it has ranks there.
    """
    if op.ranks == 1:
        return 0.0
    node, network = hardware.node, hardware.network
    here = max(1, min(op.ranks, hardware.ranks // stride))
    nodes = -(-op.ranks // here)
    times = 2 if op.operation == "all_reduce" else 1
    inside = times * (op.ranks - nodes) * node.hop_seconds
    if nodes == 1:
        return node.start_seconds + inside + op.bytes / node.bandwidth
    bandwidth = network.bandwidth * here
    if here > 1:
        bandwidth = min(bandwidth, node.bandwidth)
    latency = inside + times * nodes * network.hop_seconds
    if op.operation == "all_reduce":
        tree = log2(nodes) * network.hop_seconds + log2(here) * node.hop_seconds
        latency = min(latency, times * tree)
    return network.start_seconds + latency + op.bytes / bandwidth


def message_seconds(hardware: Hardware, size: int, source: int, destination: int) -> float:
    """`size` bytes from one rank of the grid to another."""
    same = source // hardware.ranks == destination // hardware.ranks
    link = hardware.node if same else hardware.network
    return link.start_seconds + link.hop_seconds + size / link.bandwidth
