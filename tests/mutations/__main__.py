"""Damages what a run reads, N times, and prints what was taken for whole; 1 is then the exit code.

    python -m tests.mutations --n 5 --seed 1 --json mutations.json

N times every file × region × fault: a checkpoint's manifest and tensor files, and the token file,
its index, its sidecar and the tokenizer. A failure is printed with the seed that repeats it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from tests.chaos.pairs import config_of, make_data
from tests.mutations import checkpoint, data

Mutation = tuple[str, str, str]
Strike = Callable[[Mutation, random.Random], str | None]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=5, help="of each kind (default 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the counts there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[tuple[str, str]] = Counter()
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        for strike, mutation in targets(Path(folder)):
            for number in range(given.n):
                generator = random.Random(f"{given.seed}/{number}/{mutation}")
                fault = strike(mutation, generator)
                if fault is not None:
                    counts[mutation[0], mutation[2]] += 1
                if fault:
                    faults.append(f"seed {given.seed}, number {number}, {mutation}: {fault}")
                    print(faults[-1], flush=True)
    report(counts, faults, given)
    return 1 if faults else 0


def targets(folder: Path) -> Iterator[tuple[Strike, Mutation]]:
    """All that is to be damaged, and what damages it and judges the answer."""
    make_data(folder)
    victim = checkpoint.Victim(config_of("1", folder))
    for mutation in checkpoint.mutations(victim):
        yield partial(checkpoint.accepted, victim), mutation
    files = data.Data(folder, victim)
    for mutation in data.mutations(files):
        yield partial(data.accepted, files), mutation


def report(counts: Counter[tuple[str, str]], faults: list[str], given: argparse.Namespace) -> None:
    """Print how many of each file and each fault there were, and write it to --json."""
    files: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for (file, kind), count in counts.items():
        files[file] += count
        kinds[kind] += count
    for group in (files, kinds):
        print(", ".join(f"{name}: {count}" for name, count in group.items()))
    print(f"{counts.total()} mutations: {len(faults)} not answered rightly")
    if given.json:
        body = {"n": given.n, "seed": given.seed, "mutations": counts.total(), "faults": faults}
        body |= {"files": dict(files), "kinds": dict(kinds)}
        given.json.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
