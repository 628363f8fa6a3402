"""The CPU's attention kernels beside PyTorch's flash kernel, forward and backward.

Both take turns in one process, round after round, so that they meet the same load of the machine.
Figures are medians over rounds, ratios are medians of the ratios within a round; `noise` is
PyTorch's slowest round over its median. One thread is timed by what it spends on a core, so that
waiting for one does not count; several are timed by the clock. FLOPs are those of the scores that
causal attention needs, half of all: 2·S²·E forward and 5·S²·E backward for a head of a sample.

    python benchmarks/attention_cpu.py [--json F] [--rounds N] [--threads N …] [--shape NAME …]

Queries, keys and values are views of one fused matrix, as in the passes, and ours writes its
gradients into another. PyTorch's kernel returns its own.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from reporting import about, cpu_variant, save
from torch import Tensor

from megallama.kernels.attention import attention_backward, attention_forward


@dataclass(frozen=True)
class Shape:
    """B samples of S tokens, H query heads, K key/value heads of width E."""

    samples: int
    length: int
    heads: int
    key_heads: int
    width: int
    dtype: str = "bfloat16"

    @property
    def flops(self) -> int:
        return 2 * self.samples * self.heads * self.length**2 * self.width


SHAPES = {
    "512-bf16": Shape(2, 1024, 8, 8, 64),
    "2048-bf16": Shape(1, 2048, 16, 16, 128),
    "grouped-bf16": Shape(2, 1024, 8, 2, 64),
    "demo-fp32": Shape(8, 256, 4, 4, 32, "float32"),
    "512-fp32": Shape(2, 1024, 8, 8, 64, "float32"),
}
THREADS, SECONDS_A_TURN = (1, 2), 0.05

#: An op's kernel and PyTorch's.
Contest = tuple[Callable[[], Any], Callable[[], Any]]


def contests(shape: Shape) -> dict[str, Contest]:
    tokens, dtype = shape.samples * shape.length, getattr(torch, shape.dtype)
    split = (shape.heads, shape.key_heads, shape.key_heads)
    fused, dfused = (torch.randn(tokens, sum(split), shape.width).to(dtype) for _ in range(2))
    do = torch.randn(tokens, shape.heads, shape.width).to(dtype)
    (q, k, v), (dq, dk, dv) = fused.split(split, dim=1), dfused.split(split, dim=1)
    lengths = [shape.length] * shape.samples
    o, lse = attention_forward(q, k, v, lengths)

    def by_sample(x: Tensor) -> Tensor:
        return x.view(shape.samples, shape.length, *x.shape[1:]).transpose(1, 2)

    theirs, flash = [by_sample(x) for x in (q, k, v)], torch.ops.aten
    forward = flash._scaled_dot_product_flash_attention_for_cpu
    backward = flash._scaled_dot_product_flash_attention_for_cpu_backward
    their_saved, their_do = forward(*theirs, 0.0, True), by_sample(do)
    return {
        "forward": (
            lambda: attention_forward(q, k, v, lengths),
            lambda: forward(*theirs, 0.0, True),
        ),
        "backward": (
            lambda: attention_backward(do, (q, k, v), o, lse, lengths, (dq, dk, dv)),
            lambda: backward(their_do, *theirs, *their_saved, 0.0, True),
        ),
    }


def seconds(call: Callable[[], Any], times: int) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    for _ in range(times):
        call()
    return (clock() - began) / times


def compare(contest: Contest, flops: float, rounds: int) -> dict[str, Any]:
    """One row of the results."""
    calls = dict(zip(("kernel", "pytorch"), contest, strict=True))
    times = {name: max(1, int(SECONDS_A_TURN / seconds(call, 2))) for name, call in calls.items()}
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            took[name].append(seconds(call, times[name]))
    ratios = [theirs / ours for ours, theirs in zip(*took.values(), strict=True)]
    medians = {name: statistics.median(each) for name, each in took.items()}
    return {
        **{f"{name}_milliseconds": round(1e3 * each, 3) for name, each in medians.items()},
        **{f"{name}_gflops": round(flops / each / 1e9, 1) for name, each in medians.items()},
        "pytorch_over_kernel_seconds": round(statistics.median(ratios), 3),
        "noise": round(max(took["pytorch"]) / medians["pytorch"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", nargs="+", type=int, default=THREADS)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args()
    rows = []
    for threads, name in itertools.product(args.threads, args.shape):
        torch.set_num_threads(threads)
        shape = SHAPES[name]
        for op, contest in contests(shape).items():
            flops = shape.flops * (2.5 if op == "backward" else 1)
            row = {"op": f"attention_{op}", "shape": name, "threads": threads}
            row |= compare(contest, flops, args.rounds)
            rows.append(row)
            print(
                f"{row['op']:18} {name:12} {threads} threads {row['kernel_milliseconds']:8.2f} ms, "
                f"{row['kernel_gflops']:5.0f} GFLOP/s, "
                f"{row['pytorch_over_kernel_seconds']:5.2f} times PyTorch's"
                f"   (noise {row['noise']:.1f})",
                flush=True,
            )
    report = {
        **about("attention_cpu.py"),
        "shapes": {name: asdict(SHAPES[name]) for name in args.shape},
        "variant": cpu_variant(),
        "attention": rows,
    }
    save(args.json, report)


if __name__ == "__main__":
    main()
