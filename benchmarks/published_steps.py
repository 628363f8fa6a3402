"""Predicted steps beside published ones: Megatron-LM's GPT runs, and LLaMA-65B.

    python benchmarks/published_steps.py [--fit]

Every time in the column "predicted" is a prediction for one machine, a100-80gb. `--fit` fits the
two constants that have no source anew, on the rows of 22B and 175B alone, and prints them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

from megallama.config.load import load_config
from megallama.plan.fit import fit, with_fitted
from megallama.plan.hardware import Hardware, load_hardware
from megallama.plan.llama_era import era_layouts
from megallama.plan.published import Run, compare, read_runs

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "tests" / "reference" / "published_steps.csv"
FITTED = ("gpt-22b", "gpt-175b")
#: Touvron et al., arXiv 2302.13971, §2.4.
LLAMA_65B = 380


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fit", action="store_true", help="fit the two constants anew")
    machine, runs = load_hardware("a100-80gb"), read_runs(ROWS.read_text().splitlines())
    if parser.parse_args().fit:
        addition, softmax = fit([r for r in runs if r.name in FITTED], machine)
        print(f"fitted: gemm.addition {addition:.3f}, memory.shares.softmax {softmax:.3f}")
        machine = with_fitted(machine, addition, softmax)
    print_table(runs, machine)
    print_llama(machine)


def print_table(runs: list[Run], machine: Hardware) -> None:
    lines = compare(runs, machine)
    print("run       recompute  measured s  predicted s   error")
    for line in lines:
        run, fitted = line.run, "  fitted" if line.run.name in FITTED else ""
        times = f"{run.seconds:10.2f}  {line.predicted:11.2f}  {100 * line.error:+6.2f}%{fitted}"
        print(f"{run.name:9} {run.recompute:10} {times}")
    errors = [abs(line.error) for line in lines if line.run.name not in FITTED]
    print(f"rows not fitted: mean {100 * mean(errors):.2f}%, largest {100 * max(errors):.2f}%")


def print_llama(machine: Hardware) -> None:
    model = load_config(ROOT / "configs" / "llama-65b.yaml").model
    print("\nLLaMA-65B on 2048 GPUs, layouts of its time, predicted:")
    found = era_layouts(model, 2048, 2048, machine, 2048)
    for era in found:
        layout = f"tp 8 pp {era.pp} v {era.virtual_stages} dp {era.dp} b {era.micro_batch}"
        shard = "sequence parallel" if era.sequence_parallel else ""
        print(f"  {layout:28} {era.tokens_per_second_per_gpu:5.0f} tokens/s/GPU  {shard}")
    rates = [era.tokens_per_second_per_gpu for era in found]
    print(f"  {min(rates):.0f} to {max(rates):.0f}; published: {LLAMA_65B}, layout unknown")


if __name__ == "__main__":
    main()
