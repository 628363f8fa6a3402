"""Each GPU kernel's bandwidth beside a large copy's in the same run, and the GEMM ceiling.

    python benchmarks/kernels_gpu.py [--json F] [--seconds N] [--only OP …] [--device cpu] [--quick]

Bytes are those that the op must move: each operand once. A round times the kernel, the copy and the
op's PyTorch reference after one another with CUDA events; figures are medians over rounds, shares
medians of the ratios within a round. Calls go round through several sets of operands, together
larger than the second cache three times over. The device is kept busy while the calls are queued,
so that no launch is waited for. With `--device cpu --quick` the same code runs on a CPU in seconds,
which shows that it works and nothing else.

The report is written after every op: whoever is stopped loses one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megallama.kernels import adamw, cross_entropy, native, rms_norm, rope, squared_norm, swiglu
from megallama.train.device import device_name
from megallama.train.doctor import versions

EPS, HEAD_WIDTH = 1e-5, 128
#: Model width → feed-forward width and vocabulary, of LLaMA 7B and of 65B with Llama 3's tokens.
WIDTHS = {4096: (11008, 32000), 8192: (22016, 128256)}
GEMMS = (4096, 8192, 16384)
COPY_BYTES, FLAT = 4 << 30, 1 << 28
CALLS, CACHE = 8, 64 << 20


@dataclass(frozen=True)
class Contest:
    """An op: its kernel, its reference, the operands of a call and the bytes that one moves."""

    op: str
    width: int
    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    operands: Callable[[], tuple[Any, ...]]
    size: int


class Sizes:
    """What is measured: LLaMA's shapes, or in a moment."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.device = device
        self.tokens, part = (64, 64) if quick else (8192, 1)
        self.widths = {d // part: (f // part, v // part) for d, (f, v) in WIDTHS.items()}
        self.gemms = tuple(size // part for size in GEMMS)
        self.copy_bytes, self.flat = (1 << 20, 1 << 16) if quick else (COPY_BYTES, FLAT)
        self.rounds, self.cache = (2, 0) if quick else (15, CACHE)

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype)


def contests(sizes: Sizes) -> Iterator[Contest]:
    for width, (inner, vocab) in sizes.widths.items():
        yield from norms(sizes, width)
        yield from rotations(sizes, width)
        yield from feed_forwards(sizes, width, inner)
        yield from losses(sizes, width, vocab)
    yield from updates(sizes)


def norms(sizes: Sizes, width: int) -> Iterator[Contest]:
    rows, row = sizes.tokens, 2 * sizes.tokens * width
    forward, plain = rms_norm._forward, rms_norm._forward_reference
    backward, plain_backward = rms_norm._backward, rms_norm._backward_reference

    def matrices(count: int) -> list[Tensor]:
        return [sizes.random(rows, width) for _ in range(count)]

    def alone() -> tuple[Any, ...]:
        x, n = matrices(2)
        return x, None, sizes.random(width), EPS, n, None

    def added() -> tuple[Any, ...]:
        x, y, n, total = matrices(4)
        return x, y, sizes.random(width), EPS, n, total

    def gradient(residual: bool) -> tuple[Any, ...]:
        dn, x, y, dx = matrices(4)
        dw = torch.zeros(width, device=sizes.device)
        return dn, x, sizes.random(width), EPS, y if residual else None, dx, dw

    yield Contest("rms_norm_forward", width, forward, plain, alone, 2 * row)
    yield Contest("add_rms_norm_forward", width, forward, plain, added, 4 * row)
    for name, residual in {"rms_norm_backward": False, "rms_norm_backward_residual": True}.items():
        moved = (4 if residual else 3) * row

        def operands(residual: bool = residual) -> tuple[Any, ...]:
            return gradient(residual)

        yield Contest(name, width, backward, plain_backward, operands, moved)


def rotations(sizes: Sizes, width: int) -> Iterator[Contest]:
    """In place on the queries and keys of fused rows: forward and backward are one kernel."""
    head = min(HEAD_WIDTH, width // 4)
    heads = width // head

    def operands() -> tuple[Any, ...]:
        qkv = sizes.random(sizes.tokens, 3 * heads, head)
        angles = torch.rand(sizes.tokens, 1, head // 2, device=sizes.device)
        return qkv[:, : 2 * heads], angles.cos(), angles.sin(), False

    size = 2 * 2 * (2 * sizes.tokens * width) + 2 * sizes.tokens * (head // 2) * 4
    yield Contest("rope", width, rope._rope, rope._reference, operands, size)


def feed_forwards(sizes: Sizes, width: int, inner: int) -> Iterator[Contest]:
    def forward() -> tuple[Tensor, ...]:
        return sizes.random(sizes.tokens, 2 * inner), sizes.random(sizes.tokens, inner)

    def backward() -> tuple[Tensor, ...]:
        (gate_up, act), (dgate_up, dact) = forward(), forward()
        return dact, gate_up, dgate_up, act

    act = 2 * sizes.tokens * inner
    plain, plain_backward = swiglu._forward_reference, swiglu._backward_reference
    yield Contest("swiglu_forward", width, swiglu._forward, plain, forward, 3 * act)
    yield Contest("swiglu_backward", width, swiglu._backward, plain_backward, backward, 6 * act)


def losses(sizes: Sizes, width: int, vocab: int) -> Iterator[Contest]:
    tokens, size = sizes.tokens, 2 * sizes.tokens * vocab

    def vectors(count: int) -> list[Tensor]:
        return [torch.ones(tokens, device=sizes.device) for _ in range(count)]

    def both() -> tuple[Tensor, Tensor]:
        labels = torch.randint(vocab, (tokens,), device=sizes.device)
        return sizes.random(tokens, vocab), labels

    def scratch() -> Tensor:
        return torch.empty(torch.get_num_threads(), vocab, device=sizes.device)

    calls = {
        "cross_entropy": lambda: (*both(), vocab, *vectors(1), scratch()),
        "cross_entropy_statistics": lambda: (*both(), 0, vocab, *vectors(2)),
        "cross_entropy_gradient": lambda: (*both(), *vectors(1), 0, vocab),
    }
    for name, operands in calls.items():
        part = {"cross_entropy": "_fused"}.get(name, name.removeprefix("cross_entropy"))
        kernel, plain = (getattr(cross_entropy, part + end) for end in ("", "_reference"))
        moved = size if part == "_statistics" else 2 * size
        yield Contest(name, width, kernel, plain, operands, moved)


def updates(sizes: Sizes) -> Iterator[Contest]:
    """Of as many elements as a large parameter has; `width` is their number."""
    update = adamw.AdamWUpdate(1e-4, (0.9, 0.95), 1e-8, 0.1, 10).factors()

    def flat() -> Tensor:
        return torch.rand(sizes.flat, device=sizes.device)

    def step() -> tuple[Any, ...]:
        divisor = torch.ones((), device=sizes.device)
        return flat(), flat(), flat(), flat(), divisor, flat().bfloat16(), update

    def norm() -> tuple[Tensor, ...]:
        partials = -(-sizes.flat // squared_norm.SHARE)
        return flat(), *(flat()[:n].double() for n in (partials, 1))

    count, square = sizes.flat, squared_norm._squared_norm
    yield Contest("adamw", count, adamw._adamw, adamw._reference, step, 30 * count)
    yield Contest("squared_norm", count, square, squared_norm._reference, norm, 4 * count)


class Clock:
    """Seconds of a call, by the device's own clock where it has one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, calls: list[Callable[[], Any]]) -> float:
        """The mean over `calls`, made one after the other."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - began) / len(calls)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(4_000_000)  # about 2 ms, in which the host queues what is timed
        first.record()
        for call in calls:
            call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3 / len(calls)


def compare(contest: Contest, sizes: Sizes, copy: Callable[[], Any]) -> dict[str, Any]:
    """One row of the results."""
    clock = Clock(sizes.device)
    sets = [contest.operands() for _ in range(1 + 3 * sizes.cache // contest.size + 1)]
    turn = [sets[i % len(sets)] for i in range(CALLS)]

    def calls(op: Callable[..., Any]) -> list[Callable[[], Any]]:
        return [lambda args=args: op(*args) for args in turn]

    contenders = {"kernel": calls(contest.kernel), "reference": calls(contest.reference)[:2]}
    contenders["copy"] = [copy]
    for each in contenders.values():
        clock(each)
    took: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(sizes.rounds):
        for name, each in contenders.items():
            took[name].append(clock(each))
    moved = {"kernel": contest.size, "reference": contest.size, "copy": sizes.copy_bytes}
    speeds = {
        f"{name}_gb_per_second": round(moved[name] / statistics.median(t) / 1e9, 1)
        for name, t in took.items()
    }
    per_byte = contest.size / sizes.copy_bytes
    shares = [c * per_byte / k for c, k in zip(took["copy"], took["kernel"], strict=True)]
    ratios = [r / k for r, k in zip(took["reference"], took["kernel"], strict=True)]
    return {
        "bytes": contest.size,
        **speeds,
        "share_of_copy": round(statistics.median(shares), 3),
        "reference_over_kernel_seconds": round(statistics.median(ratios), 2),
    }


def gemm(size: int, sizes: Sizes) -> dict[str, Any]:
    """A bf16 product of two square matrices of random numbers."""
    a, b, out = (sizes.random(size, size) for _ in range(3))
    clock, calls = Clock(sizes.device), [lambda: torch.mm(a, b, out=out)] * 4
    clock(calls)
    seconds = statistics.median(clock(calls) for _ in range(sizes.rounds))
    return {"size": size, "tflop_per_second": round(2 * size**3 / seconds / 1e12, 1)}


def copying(sizes: Sizes) -> Callable[[], Tensor]:
    """A copy that moves `copy_bytes`, half of them read and half written."""
    source = torch.ones(sizes.copy_bytes // 8, device=sizes.device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=180, help="no op is begun after these")
    parser.add_argument("--only", nargs="+", help="names of ops")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU; --device cpu --quick shows that the benchmark runs")
    began, sizes = time.monotonic(), Sizes(torch.device(args.device), args.quick)
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/kernels_gpu.py", *sys.argv[1:]]),
        "tokens": sizes.tokens,
        "device": device_name(sizes.device),
        "versions": versions() | {"cuda": torch.version.cuda},
        "compiled": args.device in native.variants(),
        "gemms": [],
        "kernels": [],
        "left_out": [],
    }

    def save() -> None:
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(report, indent=2) + "\n")

    for size in sizes.gemms:
        row = gemm(size, sizes)
        report["gemms"].append(row)
        print(f"GEMM {size:6}  {row['tflop_per_second']:8.1f} TFLOP/s", flush=True)
    copy = copying(sizes)
    for contest in contests(sizes):
        where = {"op": contest.op, "width": contest.width}
        if args.only and contest.op not in args.only:
            continue
        if time.monotonic() - began > args.seconds:
            report["left_out"].append(where | {"why": "no time was left"})
            continue
        try:
            row = where | compare(contest, sizes, copy)
        except torch.OutOfMemoryError:
            report["left_out"].append(where | {"why": "out of memory"})
            continue
        report["kernels"].append(row)
        print(
            f"{contest.op:27} {contest.width:<9} {row['kernel_gb_per_second']:8.1f} GB/s, "
            f"{row['share_of_copy']:5.2f} of the copy's {row['copy_gb_per_second']:.0f}, "
            f"{row['reference_over_kernel_seconds']:6.2f} times the reference",
            flush=True,
        )
        save()
    save()


if __name__ == "__main__":
    main()
