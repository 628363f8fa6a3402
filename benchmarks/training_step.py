"""A training step against Hugging Face's, step by step in one run.

Every contender lives in a process of its own and takes one step in turn, round after round, so all
of them meet the same load of the machine. Figures are medians over rounds; ratios are medians of
the ratios within a round. Peak memory is the process's resident maximum.

    python benchmarks/training_step.py [--json F] [--rounds N] [--only NAME …]

Contenders: ours (bf16 with fp32 masters); Hugging Face eager and under torch.compile, each as pure
bf16 and as fp32 parameters under bf16 autocast. The last is the like-for-like of our masters. AdamW
is PyTorch's fused kernel everywhere, attention PyTorch's flash kernel.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing as mp
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SHAPE = dict(d_model=512, layers=8, heads=8, kv_heads=8, ffn=1376, vocab=32000)
BATCH, LENGTH, RATE = 2, 1024, 1e-4


def ours() -> Callable[[], float]:
    """A step of megallama: returns the mean loss."""
    from megallama.config import parse_config
    from megallama.spec.grid import ALONE
    from megallama.train.bench import batches
    from megallama.train.build import build_trainer

    train = dict(steps=1, sequence_length=LENGTH, global_batch=BATCH, micro_batch=BATCH)
    config = parse_config({"model": SHAPE, "train": train, "optimizer": {"lr": RATE}})
    trainer, batch = build_trainer(config), batches(config, None, ALONE)(0)
    return lambda: trainer.step.run(batch, RATE).loss


def hugging_face(pure_bf16: bool, compiled: bool) -> Callable[[], float]:
    """A step of transformers' LLaMA."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=SHAPE["d_model"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["kv_heads"],
        intermediate_size=SHAPE["ffn"],
        vocab_size=SHAPE["vocab"],
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    dtype = torch.bfloat16 if pure_bf16 else torch.float32
    model: Any = LlamaForCausalLM._from_config(config, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1, fused=True)
    parameters = list(model.parameters())
    if compiled:
        model = torch.compile(model)
    tokens = torch.randint(SHAPE["vocab"], (BATCH, LENGTH))

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=not pure_bf16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


CONTENDERS: dict[str, Callable[[], Callable[[], float]]] = {
    "megallama": ours,
    "hf-bf16": lambda: hugging_face(pure_bf16=True, compiled=False),
    "hf-bf16-compiled": lambda: hugging_face(pure_bf16=True, compiled=True),
    "hf-autocast": lambda: hugging_face(pure_bf16=False, compiled=False),
    "hf-autocast-compiled": lambda: hugging_face(pure_bf16=False, compiled=True),
}


def serve(name: str, pipe: Connection) -> None:
    """A contender's process: a step, its seconds and the peak memory for every message."""
    import torch

    from megallama.train.device import peak_memory_bytes

    step = CONTENDERS[name]()
    while pipe.recv():
        began = time.perf_counter()
        step()
        seconds = time.perf_counter() - began
        pipe.send((seconds, peak_memory_bytes(torch.device("cpu"))))


def measure(names: list[str], rounds: int, warmup: int) -> dict[str, Any]:
    """Let the contenders step in turn; return their figures."""
    context = mp.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name in names:
        pipes[name], end = context.Pipe()
        context.Process(target=serve, args=(name, end), daemon=True).start()
        end.close()  # so that a contender that dies is an EOFError here and not a wait for ever
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peak = dict.fromkeys(names, 0)
    for turn in range(warmup + rounds):
        for name, pipe in pipes.items():
            try:
                pipe.send(True)
                took, peak[name] = pipe.recv()
            except (EOFError, BrokenPipeError):
                sys.exit(f"{name} died (its error is above); leave it out with --only")
            if turn >= warmup:
                seconds[name].append(took)
    for pipe in pipes.values():
        pipe.send(False)
    return {name: figures(name, seconds, peak[name]) for name in names}


def figures(name: str, seconds: dict[str, list[float]], peak: int) -> dict[str, Any]:
    """One contender's row; `megallama_speedup` is the median ratio within a round."""
    mine, ours = seconds[name], seconds.get("megallama")
    median = statistics.median(mine)
    row = {
        "tokens_per_second": round(BATCH * LENGTH / median, 1),
        "step_seconds": {"min": min(mine), "median": median, "max": max(mine)},
        "peak_memory_bytes": peak,
    }
    if ours:
        ratios = [their / our for their, our in zip(mine, ours, strict=True)]
        row["megallama_speedup"] = round(statistics.median(ratios), 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    args = parser.parse_args()
    from megallama.train.doctor import processor, versions

    results = measure(args.only, args.rounds, args.warmup)
    for name, row in results.items():
        speedup = row.get("megallama_speedup")
        print(
            f"{name:22} {row['tokens_per_second']:8.0f} tokens/s "
            f"{row['peak_memory_bytes'] / 1e6:8.0f} MB"
            + (f"   megallama is {speedup:.2f} times as fast" if speedup else "")
        )
    report = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/training_step.py", *sys.argv[1:]]),
        "shape": SHAPE | dict(micro_batch=BATCH, sequence_length=LENGTH, precision="bf16"),
        "hardware": processor(),
        "versions": versions() | {"transformers": importlib.metadata.version("transformers")},
        "contenders": results,
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
