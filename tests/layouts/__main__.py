"""Runs one case, the equivalence table, or a fuzz campaign; 1 is the exit code of a failure.

python -m tests.layouts "tensor=2 data=2 overlap=full"      one case
python -m tests.layouts --table default                     every pair of values (all: more)
python -m tests.layouts --fuzz 200 --seed 1                 random cases
python -m tests.layouts --counts                            what the tables cover
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable

import torch

from tests.layouts.case import Case
from tests.layouts.covering import default_table, full_table, markdown
from tests.layouts.fuzz import draw
from tests.layouts.planted import PLANTED
from tests.layouts.pool import Pool
from tests.layouts.rounding import steady
from tests.layouts.runs import Report, run_cases, summary


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.layouts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("case", nargs="?", type=_case, help="name=value words, as a failure prints")
    what.add_argument("--table", choices=("default", "all"), help="the equivalence table")
    what.add_argument("--all", dest="table", action="store_const", const="all", help="--table all")
    what.add_argument("--fuzz", type=int, metavar="N", help="N random cases")
    what.add_argument("--counts", action="store_true", help="print what the tables cover")
    parser.add_argument("--seed", type=int, default=0, help="of the fuzz (default 0)")
    parser.add_argument("--planted", choices=PLANTED, help="plant a fault, which must be found")
    return parser.parse_args()


def _case(text: str) -> Case:
    try:
        case = Case.parse(text)
        faults = case.faults()
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if faults:
        raise argparse.ArgumentTypeError(f"no such case: it breaks {', '.join(faults)}")
    return case


def run(cases: Iterable[Case], planted: str | None) -> list[Report]:
    """Run cases; print those that fail as they do."""
    reports = []
    with Pool() as pool:
        for report in run_cases(pool, cases, planted):
            reports.append(report)
            if report.faults:
                print(report, flush=True)
    return reports


def main() -> int:
    torch.set_num_threads(1)
    given = arguments()
    if given.counts:
        print(markdown({"default": default_table(), "all": full_table()}))
        return 0
    if given.fuzz is not None:
        cases: Iterable[Case] = (draw(given.seed, number) for number in range(given.fuzz))
    elif given.table:
        table = default_table() if given.table == "default" else full_table()
        cases = map(steady, table.cases)
    else:
        cases = [given.case]
    start = time.monotonic()
    reports = run(cases, given.planted)
    print(f"\n{summary(reports)}\n\n{time.monotonic() - start:.0f} s")
    return 1 if any(report.faults for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
