"""Checks random valid jobs of up to 2,048 ranks, none of which may have a fault.

python -m tests.check --n 200 --seed 0
"""

from __future__ import annotations

import argparse
import sys
import time

from megallama.check.job import check
from megallama.spec.grid import make_grid
from tests.check.draw import draw


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.check", description=__doc__)
    parser.add_argument("--n", type=int, default=200, help="jobs (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawing (default 0)")
    given = parser.parse_args()
    began, faulty, operations = time.monotonic(), 0, 0
    for number in range(given.n):
        config, ranks = draw(given.seed, number)
        checked = check(config, make_grid(config, ranks))
        operations += checked.operations
        if checked.fault is not None:
            faulty += 1
            print(f"job {number} of seed {given.seed}, {ranks} ranks: {checked.fault.text}")
    seconds = time.monotonic() - began
    print(f"{given.n} jobs, {operations:,} operations, {faulty} faulty, {seconds:.0f} s")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
