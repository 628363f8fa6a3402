"""Damages what a run reads, N times, and prints what was taken for whole; 1 is then the exit code.

    python -m tests.mutations --n 5 --seed 1

N times every file × region × fault. A failure is printed with the seed that repeats it.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from tests.chaos.pairs import config_of, make_data
from tests.mutations.checkpoint import Victim, accepted, mutations


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=5, help="of each kind (default 5)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder))
        victim = Victim(config_of("1", Path(folder)))
        for mutation in mutations(victim):
            for number in range(given.n):
                generator = random.Random(f"{given.seed}/{number}/{mutation}")
                fault = accepted(victim, mutation, generator)
                counts[mutation[0] if fault is not None else "no byte changed"] += 1
                if fault:
                    faults += 1
                    print(f"seed {given.seed}, number {number}, {', '.join(mutation)}: {fault}")
    print(", ".join(f"{name}: {count}" for name, count in counts.items()))
    print(f"{counts.total() - counts['no byte changed']} mutations: {faults} not answered rightly")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
