"""Each CPU kernel's bandwidth, beside its PyTorch reference and a copy of as many bytes.

The three take turns in one process, round after round, so all of them meet the same load of the
machine. Bytes are those that the op must move: each operand once. Figures are medians over rounds,
ratios are medians of the ratios within a round; `noise` is the copy's slowest round over its
median. One thread is timed by what it spends on a core, so that waiting for one does not count;
several are timed by the clock.

    python benchmarks/kernels_cpu.py [--json F] [--rounds N] [--threads N …] [--only OP …]

The kernels write into buffers that are kept, as a training step does; so does the copy. The
references allocate what they always do.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from reporting import about, cpu_variant, save
from torch import Tensor

from megallama.kernels import linear_wgrad, rms_norm, rope, swiglu

TOKENS, HEAD_WIDTH, EPS = 2048, 128, 1e-5
WIDTHS, DTYPES, THREADS = (512, 4096), (torch.bfloat16, torch.float32), (1, 2)
SECONDS_A_TURN = 0.005

#: The op's kernel, its reference, and the elements that it reads and writes.
Contest = tuple[Callable[[], Any], Callable[[], Any], int]


def norm(width: int, dtype: torch.dtype) -> dict[str, Contest]:
    """RMSNorm alone and with the residual added, forward and backward."""
    x, y, dn, out, total = (torch.randn(TOKENS, width).to(dtype) for _ in range(5))
    w, dw = torch.randn(width).to(dtype), torch.zeros(width)
    forward, backward = rms_norm._forward, rms_norm._backward
    plain, plain_backward = rms_norm._forward_reference, rms_norm._backward_reference
    cases: dict[str, tuple[Any, Any, tuple[Any, ...], int]] = {
        "rms_norm_forward": (forward, plain, (x, None, w, EPS, out, None), 2),
        "add_rms_norm_forward": (forward, plain, (x, y, w, EPS, out, total), 4),
        "rms_norm_backward": (backward, plain_backward, (dn, x, w, EPS, None, out, dw), 3),
        "rms_norm_backward_residual": (backward, plain_backward, (dn, x, w, EPS, y, out, dw), 4),
    }
    return {
        name: (_call(kernel, args), _call(reference, args), rows * TOKENS * width)
        for name, (kernel, reference, args, rows) in cases.items()
    }


def rotary(width: int, dtype: torch.dtype) -> dict[str, Contest]:
    """RoPE in place on the queries and keys of fused rows, and its inverse."""
    heads = width // min(HEAD_WIDTH, width // 8)
    qkv = torch.randn(TOKENS, 3 * heads, width // heads).to(dtype)
    x = qkv[:, : 2 * heads]
    angles = torch.arange(TOKENS)[:, None, None] * torch.rand(width // heads // 2)
    tables = (angles.cos().float(), angles.sin().float())
    elements = 2 * x.numel()
    calls = {
        "rope_forward": (x, *tables, False),
        "rope_backward": (x, *tables, True),
    }
    return {
        name: (_call(rope._rope, args), _call(rope._reference, args), elements)
        for name, args in calls.items()
    }


def feed_forward(width: int, dtype: torch.dtype) -> dict[str, Contest]:
    """SwiGLU at LLaMA's ratio of widths, forward and backward."""
    inner = {512: 1376, 4096: 11008}[width]
    gate_up, dgate_up = (torch.randn(TOKENS, 2 * inner).to(dtype) for _ in range(2))
    dact, act = (torch.randn(TOKENS, inner).to(dtype) for _ in range(2))
    forward, backward = (gate_up, act), (dact, gate_up, dgate_up, act)
    return {
        "swiglu_forward": (
            _call(swiglu._forward, forward),
            _call(swiglu._forward_reference, forward),
            3 * act.numel(),
        ),
        "swiglu_backward": (
            _call(swiglu._backward, backward),
            _call(swiglu._backward_reference, backward),
            6 * act.numel(),
        ),
    }


def weight_gradient(width: int, dtype: torch.dtype) -> dict[str, Contest]:
    """dw += dyᵀ·x of a square linear, fp32 under bf16, where PyTorch alone rounds the product."""
    if dtype != torch.bfloat16:
        return {}
    dy, x = (torch.randn(TOKENS, width).to(dtype) for _ in range(2))
    dw = torch.zeros(width, width)
    elements = dy.numel() + x.numel() + 4 * dw.numel()  # dw's, read and written, are twice as long
    kernel = _call(linear_wgrad._linear_wgrad, (dy, x, dw))
    return {"linear_wgrad": (kernel, lambda: dw.add_(dy.T @ x), elements)}


def _call(op: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: op(*args)


def copying(size: int) -> Callable[[], Tensor]:
    """A copy that moves `size` bytes, half of them read and half written."""
    source, target = (torch.ones(size // 8, dtype=torch.float32) for _ in range(2))
    return lambda: target.copy_(source)


def seconds(call: Callable[[], Any], times: int) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    for _ in range(times):
        call()
    return (clock() - began) / times


def compare(contest: Contest, itemsize: int, rounds: int) -> dict[str, Any]:
    """One row of the results."""
    kernel, reference, elements = contest
    size = elements * itemsize
    calls = {"kernel": kernel, "reference": reference, "copy": copying(size)}
    times = {name: max(1, int(SECONDS_A_TURN / seconds(call, 2))) for name, call in calls.items()}
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            took[name].append(seconds(call, times[name]))
    ratios = {
        f"{name}_over_kernel_seconds": round(
            statistics.median(t / k for t, k in zip(took[name], took["kernel"], strict=True)), 3
        )
        for name in ("reference", "copy")
    }
    speeds = {
        f"{name}_gb_per_second": round(size / statistics.median(t) / 1e9, 2)
        for name, t in took.items()
    }
    noise = round(max(took["copy"]) / statistics.median(took["copy"]), 2)
    return {"bytes": size, **speeds, **ratios, "noise": noise}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", nargs="+", type=int, default=THREADS)
    parser.add_argument("--only", nargs="+", help="names of ops")
    args = parser.parse_args()
    rows = []
    for threads, width, dtype in itertools.product(args.threads, WIDTHS, DTYPES):
        torch.set_num_threads(threads)
        contests = norm(width, dtype) | rotary(width, dtype) | feed_forward(width, dtype)
        contests |= weight_gradient(width, dtype)
        for name, contest in contests.items():
            if args.only and name not in args.only:
                continue
            where = {"op": name, "width": width, "dtype": str(dtype)[6:], "threads": threads}
            row = where | compare(contest, dtype.itemsize, args.rounds)
            rows.append(row)
            print(
                f"{name:27} D={width:<5} {where['dtype']:8} {threads} threads "
                f"{row['kernel_gb_per_second']:7.1f} GB/s, "
                f"{row['copy_over_kernel_seconds']:5.2f} of a copy, "
                f"{row['reference_over_kernel_seconds']:6.2f} times the reference"
                f"   (noise {row['noise']:.1f})",
                flush=True,
            )
    report = {
        **about("kernels_cpu.py"),
        "tokens": TOKENS,
        "variant": cpu_variant(),
        "kernels": rows,
    }
    save(args.json, report)


if __name__ == "__main__":
    main()
