"""Training steps of LLaMA 7B on one GPU: megallama under every policy, and its peers.

    python benchmarks/training_step_gpu.py [--json F] [--seconds N] [--layers N] [--only NAME …]
                                           [--device cpu --quick]

Contenders (contenders.py) have the GPU to themselves, one after the other, each in a process of its
own; figures are medians over steps. A step is eight micro-batches of 4,096 tokens, so that the
optimizer's share is a run's and not a toy's. All 32 layers, where bf16 weights with fp32 masters,
gradients and moments fit (18 bytes a parameter); --layers takes fewer. Peers with fp32 parameters
under autocast do not fit with 32: they are compared at 16, megallama beside them.

MFU counts the model's FLOPs (megallama/spec/flops.py) and is null where the peak is unknown. The
report is written after every contender; what ran out of memory or time is in it, with the reason.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import multiprocessing as mp
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, POLICY, Case, Contender, Megallama, attention_of

from megallama.spec.flops import flops_per_token
from megallama.spec.saved import POLICIES

LLAMA_7B = Case(4096, 32, 32, 32, 11008, 32000, 4096, 1, 8, "bf16", "cuda")
QUICK = Case(64, 2, 2, 2, 176, 512, 64, 1, 2, "bf16", "cpu")
WARMUP, STEPS, SECONDS_OF_STEPS = 2, (2, 8), 7.0
#: Peers that are not measured here yet; the report says whether they could be.
OTHERS = ("torchtitan", "megatron.core", "flash_attn")


@dataclass(frozen=True)
class Entry:
    """One contender on one shape; `policy` is megallama's alone."""

    name: str
    case: Case
    policy: str = POLICY

    def build(self) -> Contender:
        if self.name == "megallama":
            return Megallama(self.case, self.policy)
        return CONTENDERS[self.case.precision][self.name](self.case)


def entries(whole: Case) -> Iterator[Entry]:
    """What is measured, the most wanted first."""
    short = replace(whole, length=whole.length // 2, micro_batch=2 * whole.micro_batch)
    half = replace(whole, layers=max(1, whole.layers // 2))
    yield Entry("megallama", whole)
    yield Entry("hf-bf16-compiled", whole)
    yield Entry("megallama", short)
    yield Entry("hf-bf16", whole)
    yield Entry("megallama", half)
    yield Entry("hf-autocast-compiled", half)
    for policy in POLICIES:
        if policy != POLICY:
            yield Entry("megallama", whole, policy)
    yield Entry("hf-bf16-compiled", short)
    yield Entry("hf-autocast", half)


def serve(entry: Entry, pipe: Connection) -> None:
    """A contender's process: sends its row, or the reason why there is none."""
    import torch

    try:
        pipe.send(measure(entry))
    except torch.OutOfMemoryError as error:
        pipe.send({"left_out": f"out of memory: {error}".split(". ")[0]})


def measure(entry: Entry) -> dict[str, Any]:
    import torch

    from megallama.train.device import device_peak_flops, peak_memory_bytes

    case, device = entry.case, torch.device(entry.case.device)
    contender, seconds = entry.build(), []
    fewest, most = STEPS
    for turn in range(WARMUP + most):
        if turn == WARMUP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        began = time.perf_counter()
        contender.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
        if turn + 1 >= WARMUP + fewest and sum(seconds[WARMUP:]) > SECONDS_OF_STEPS:
            break
    median = statistics.median(seconds[WARMUP:])
    kept = {
        storage.data_ptr(): storage.nbytes()
        for tensors in contender.kept().values()
        for storage in (tensor.untyped_storage() for tensor in tensors)
    }
    flops = flops_per_token(case.config().model, case.length) * case.tokens / median
    peak = device_peak_flops(device)
    return {
        "tokens_per_second": round(case.tokens / median, 1),
        "step_seconds": seconds[WARMUP:],
        "tflop_per_second": round(flops / 1e12, 2),
        "mfu": round(flops / peak, 4) if peak else None,
        "peak_memory_bytes": peak_memory_bytes(device),
        "bytes_of_parameters_gradients_and_optimizer": sum(kept.values()),
    }


def row_of(entry: Entry, seconds: float) -> dict[str, Any]:
    """Run an entry in its process, for so long at most."""
    context = mp.get_context("spawn")
    pipe, end = context.Pipe()
    process = context.Process(target=serve, args=(entry, end), daemon=True)
    process.start()
    end.close()
    try:
        if not pipe.poll(seconds):
            return {"left_out": "no time was left"}
        return pipe.recv()
    except EOFError:
        return {"left_out": "it died; its error is in the output"}
    finally:
        process.kill()
        process.join()


def add_speedups(rows: list[dict[str, Any]]) -> None:
    """megallama's speed, under its default policy, over each peer's at the same shape."""

    def speed(row: dict[str, Any]) -> float | None:
        return row.get("tokens_per_second")

    ours = {
        str(row["shape"]): speed(row)
        for row in rows
        if row["name"] == "megallama" and row["policy"] == POLICY
    }
    for row in rows:
        mine, theirs = ours.get(str(row["shape"])), speed(row)
        if mine and theirs:
            row["megallama_speedup"] = round(mine / theirs, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=300, help="for everything")
    parser.add_argument("--layers", type=int, default=LLAMA_7B.layers)
    parser.add_argument("--only", nargs="+", help="names of contenders")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny shape")
    args = parser.parse_args()
    import torch

    from megallama.train.device import device_name
    from megallama.train.doctor import versions

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU; --device cpu --quick shows that the benchmark runs")
    deadline = time.monotonic() + args.seconds
    whole = QUICK if args.quick else replace(LLAMA_7B, layers=args.layers)
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/training_step_gpu.py", *sys.argv[1:]]),
        "device": device_name(torch.device(args.device)),
        "versions": versions()
        | {"transformers": importlib.metadata.version("transformers"), "cuda": torch.version.cuda},
        "peers_attention": attention_of(args.device),
        "importable": {name: is_importable(name) for name in OTHERS},
        "rows": [],
    }
    for entry in entries(replace(whole, device=args.device)):
        if args.only and entry.name not in args.only:
            continue
        left = deadline - time.monotonic()
        row = row_of(entry, left) if left > 0 else {"left_out": "no time was left"}
        about = {"name": entry.name, "shape": entry.case.as_json()}
        about["policy"] = entry.policy if entry.name == "megallama" else None
        report["rows"].append(about | row)
        add_speedups(report["rows"])
        show(report["rows"][-1])
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(report, indent=2) + "\n")


def is_importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def show(row: dict[str, Any]) -> None:
    shape = row["shape"]
    what = f"{row['name']:21} {row['policy'] or '':20} L={shape['layers']} S={shape['length']}"
    if "left_out" in row:
        print(f"{what}  left out: {row['left_out']}", flush=True)
        return
    mfu, ratio = row["mfu"], row.get("megallama_speedup")
    print(
        f"{what}  {row['tokens_per_second']:8.0f} tokens/s  {row['tflop_per_second']:6.1f} TFLOP/s"
        + (f" ({mfu:.1%} of peak)" if mfu else "")
        + f"  peak {row['peak_memory_bytes'] / 2**30:6.1f} GiB"
        + (f"; megallama is {ratio:.2f} times as fast" if ratio else ""),
        flush=True,
    )


if __name__ == "__main__":
    main()
