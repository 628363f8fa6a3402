"""A training step on the CPU against Hugging Face's, step by step in one run.

Every contender lives in a process of its own and takes one step in turn, round after round, so all
of them meet the same load of the machine. Figures are medians over rounds; ratios are medians of
the ratios within a round. Of each shape and precision as many rounds are made as fit its time.

    python benchmarks/training_step.py [--shape NAME …] [--precision bf16 fp32] [--only NAME …]
                                       [--rounds N] [--json F]

Memory is counted twice. `peak_memory_bytes` is the process's resident maximum over the timed steps.
`tensor_bytes` is what tensors occupy in the second warm-up step, from the allocator's own events
(tensor_memory.py): the peak of all, and of what is temporary: all but parameters, gradients and the
optimizer's state, hence activations, logits and workspaces. The contenders are contenders.py's.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.metadata
import json
import multiprocessing as mp
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from contenders import CONTENDERS, Case

#: The first is the one that the project's promises are about.
SHAPES: dict[str, Case] = {
    "512": Case(512, 8, 8, 8, 1376, 32000, 1024, 2),
    "1024": Case(1024, 4, 16, 16, 2752, 32000, 1024, 2),
    "256": Case(256, 6, 4, 4, 688, 32000, 1024, 2),
    "tiny": Case(64, 2, 2, 2, 176, 512, 64, 2),
}
REST = "activations, logits and workspaces"
WARMUP, SECONDS, ROUNDS = 2, 90.0, (3, 9)


def serve(case: Case, name: str, pipe: Connection) -> None:
    """A contender's process: its tensors' bytes, then a step's seconds for every message."""
    import torch
    from tensor_memory import TensorMemory

    from megallama.train.device import peak_memory_bytes

    memory = TensorMemory(torch.device(case.device))
    contender = CONTENDERS[case.precision][name](case)
    for turn in range(WARMUP):
        pipe.recv()
        with memory.step() if turn == WARMUP - 1 else nullcontext():
            contender.step()
        pipe.send(None)
    figures = memory.figures(contender.kept())
    del memory
    forget_the_peak()
    pipe.send(figures)
    while pipe.recv():
        began = time.perf_counter()
        contender.step()
        seconds = time.perf_counter() - began
        pipe.send((seconds, peak_memory_bytes_since(peak_memory_bytes(torch.device("cpu")))))


def forget_the_peak() -> None:
    """Give back the profiler's memory and let the resident maximum begin anew, where Linux can."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes_since(default: int) -> int:
    """The resident maximum since it was forgotten; `default` where only the process's is known."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return default


class Turns:
    """Contenders in processes of their own, which step when they are asked to."""

    def __init__(self, case: Case, names: Sequence[str]) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says when it starts
        context = mp.get_context("spawn")
        self.pipes: dict[str, Connection] = {}
        for name in names:
            self.pipes[name], end = context.Pipe()
            context.Process(target=serve, args=(case, name, end), daemon=True).start()
            end.close()  # so that a contender that dies is an EOFError here, not a wait for ever

    def ask(self, name: str, again: bool = True) -> Any:
        try:
            self.pipes[name].send(again)
            return self.pipes[name].recv() if again else None
        except (EOFError, BrokenPipeError):
            sys.exit(f"{name} died (its error is above); leave it out with --only")

    def after_warmup(self) -> dict[str, dict[str, int]]:
        """The bytes of each contender's tensors."""
        for _ in range(WARMUP):
            for name in self.pipes:
                self.ask(name)
        return {name: pipe.recv() for name, pipe in self.pipes.items()}


def measure(case: Case, names: Sequence[str], rounds: int | None) -> dict[str, Any]:
    """Let the contenders step in turn; return their figures."""
    turns = Turns(case, names)
    tensors = turns.after_warmup()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peak = dict.fromkeys(names, 0)
    began, done, (fewest, most) = time.perf_counter(), 0, ROUNDS

    def another() -> bool:
        if rounds is not None:
            return done < rounds
        return done < fewest or (done < most and time.perf_counter() - began < SECONDS)

    while another():
        for name in names:
            took, peak[name] = turns.ask(name)
            seconds[name].append(took)
        done += 1
    for name in names:
        turns.ask(name, again=False)
    rows = {}
    for name in names:
        row = figures(case, seconds[name], seconds.get("megallama"))
        rows[name] = row | {"peak_memory_bytes": peak[name], "tensor_bytes": tensors[name]}
        if "megallama" in tensors:
            ratio = tensors["megallama"][REST] / tensors[name][REST]
            rows[name]["megallama_share_of_temporary_bytes"] = round(ratio, 3)
    return rows


def figures(case: Case, mine: list[float], ours: list[float] | None) -> dict[str, Any]:
    """One contender's speed; `megallama_speedup` is the median ratio within a round."""
    median = statistics.median(mine)
    row: dict[str, Any] = {
        "tokens_per_second": round(case.tokens / median, 1),
        "step_seconds": {"min": min(mine), "median": median, "max": max(mine)},
        "rounds": len(mine),
    }
    if ours:
        ratios = [their / our for their, our in zip(mine, ours, strict=True)]
        row["megallama_speedup"] = round(statistics.median(ratios), 3)
    return row


def show(case: Case, rows: dict[str, Any]) -> None:
    print(f"D={case.d_model} L={case.layers} V={case.vocab} {case.precision}")
    for name, row in rows.items():
        speedup, tensors = row.get("megallama_speedup"), row["tensor_bytes"]
        print(
            f"  {name:21} {row['tokens_per_second']:8.0f} tokens/s, "
            f"resident {row['peak_memory_bytes'] / 1e6:5.0f} MB, tensors "
            f"{tensors['peak'] / 1e6:5.0f} MB, of which temporary {tensors[REST] / 1e6:5.0f} MB"
            + (f"; megallama is {speedup:.2f} times as fast" if speedup else ""),
            flush=True,
        )


def save(path: Path | None, report: dict[str, Any]) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")


def main() -> None:
    every = list(dict.fromkeys(name for group in CONTENDERS.values() for name in group))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["512", "1024", "256"])
    parser.add_argument("--precision", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, help="of each contest; default: as time permits")
    parser.add_argument("--only", nargs="+", choices=every, default=every)
    args = parser.parse_args()
    from megallama.train.doctor import processor, versions

    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/training_step.py", *sys.argv[1:]]),
        "hardware": processor(),
        "versions": versions() | {"transformers": importlib.metadata.version("transformers")},
        "contests": [],
    }
    for precision in args.precision:
        names = [name for name in CONTENDERS[precision] if name in args.only]
        for shape in args.shape if names else ():
            case = Case(**SHAPES[shape].as_json() | {"precision": precision})
            rows = measure(case, names, args.rounds)
            show(case, rows)
            report["contests"].append({"shape": case.as_json(), "contenders": rows})
            save(args.json, report)


if __name__ == "__main__":
    main()
