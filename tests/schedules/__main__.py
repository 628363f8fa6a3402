"""All schedules of p = 1…16 stages, m = 1…64 micro-batches, v = 1…4 chunks; 1 where one fails.

python -m tests.schedules                    all
python -m tests.schedules zb-v --stages 8    one of them, up to 8 stages
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product

from megallama.spec.schedules.build import NAMES, make_schedule
from megallama.spec.schedules.simulate import ScheduleError
from tests.schedules.closed_forms import virtual_stages
from tests.schedules.properties import check, check_evaluation

MOST_CHUNKS = 4


def faults(name: str, p: int, micro_batches: int) -> tuple[int, list[str]]:
    """How many schedules of p stages there are, and what is wrong with them."""
    found, count = [], 0
    for m, v in product(range(1, micro_batches + 1), virtual_stages(name, MOST_CHUNKS)):
        count += 1
        try:
            check(name, p, m, v)
            check_evaluation(make_schedule(name, p, m, v))
        except (AssertionError, ScheduleError) as error:
            found.append(f"{name} p={p} m={m} v={v}: {str(error) or 'see its check'}")
    return count, found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.schedules",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", help="default: all")
    parser.add_argument("--stages", type=int, default=16, metavar="P", help="at most (16)")
    parser.add_argument("--microbatches", type=int, default=64, metavar="M", help="at most (64)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes")
    args = parser.parse_args()
    failed = 0
    with ProcessPoolExecutor(args.jobs) as pool:
        for name in args.names or NAMES:
            began, stages = time.monotonic(), range(1, args.stages + 1)
            jobs = [pool.submit(faults, name, p, args.microbatches) for p in reversed(stages)]
            results = [job.result() for job in jobs]
            wrong = [line for _, lines in results for line in lines]
            count, seconds = sum(count for count, _ in results), time.monotonic() - began
            print(f"{name:18} {count:5} schedules  {len(wrong)} failed  {seconds:.0f} s")
            print(*wrong[:20], sep="\n", end="\n" if wrong else "", flush=True)
            failed += len(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
