"""A campaign of random cases: `python -m tests.chaos --n 100 --seed 0`; `--help` for the rest.

A large one goes in pieces, each with a seed and a summary of its own, which are added up:

    for seed in 0 1 2 3 4 5 6 7 8 9; do
        python -m tests.chaos --n 100 --seed $seed --json chaos-$seed.json
    done
    python -m tests.chaos --sum chaos-*.json
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch.distributed import Store

from megallama.data.build import build
from megallama.data.tokenizer import train_tokenizer
from tests.chaos.flips import CASES, campaign
from tests.chaos.kills import STOPS, draw, drawn, parse
from tests.chaos.runs import Arena
from tests.chaos.tally import Tally
from tests.conftest import SOURCES, VOCAB, TinyData
from tests.dist.commands import write_config
from tests.dist.processes import run_on
from tests.layouts.case import Case as FlipCase


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--n", type=int, default=100, help="cases, or a few more for LEAST")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--signal", default="SIGKILL", choices=["SIGKILL", "SIGTERM", "SIGUSR1", "SIGSTOP"]
    )
    parser.add_argument("--at-once", type=int, default=3, help="cases side by side")
    parser.add_argument("--case", help="this case alone, as a failing one is printed")
    parser.add_argument("--flips", type=int, default=0, help="instead: bits to flip in replicas")
    parser.add_argument("--clean", type=int, default=0, help="and steps without a flip")
    parser.add_argument("--json", type=Path, help="write the summary there, too")
    parser.add_argument("--sum", type=Path, nargs="+", help="instead: add up such summaries")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.sum:
        tally = Tally.read(args.sum)
    elif args.flips or args.clean:
        return _flips(args)
    else:
        tally = _fight(args)
    if args.json:
        args.json.write_text(json.dumps(asdict(tally), indent=1) + "\n")
    print(tally.text())
    return int(bool(tally.faulty))


def _fight(args: argparse.Namespace) -> Tally:
    generator, kind = random.Random(args.seed), signal.Signals[args.signal]
    tally, began = Tally(args.signal, [args.seed]), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="megallama-chaos-") as name:
        folder = Path(name)
        arena = Arena(folder, write_config(folder, _data(folder / "data"), **SECTIONS))
        cases = [parse(args.case)] if args.case else drawn(generator, kind, args.n)
        while cases:
            for outcome in arena.fight(cases, args.at_once):
                tally.add(outcome)
            short = [] if args.case or kind in STOPS else tally.short(args.n)
            cases = [draw(generator, kind, place) for place in short]
    tally.seconds = round(time.monotonic() - began)
    return tally


#: What the runs have beside the words of a layout.
SECTIONS = {
    "model": {"layers": 4},
    "train": {"precision": "fp32"},
    "validation": {"every": 4, "sequences": 2},
}


def _data(folder: Path) -> TinyData:
    """Two sources of random words."""
    folder.mkdir()
    generator = random.Random(0)
    words = ["def", "return", "for", "x", "y", "+", "12", "the", "fox", "and", "a", "dog"]
    corpora = [folder / f"{name}.jsonl" for name in SOURCES]
    for corpus in corpora:
        texts = (" ".join(generator.choices(words, k=generator.randint(5, 40))) for _ in range(60))
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(corpora, VOCAB, folder / "tokenizer.model")
    for corpus in corpora:
        build([corpus], folder / "tokenizer.model", corpus.with_suffix(""), "text", 1)
    return TinyData(folder / "tokenizer.model", {name: folder / name for name in SOURCES})


def _flips(args: argparse.Namespace) -> int:
    faults = list(_flip_faults(args))
    print(*faults, sep="\n")
    print(
        f"{args.flips} flips and {args.clean} clean steps over {len(CASES)} layouts, seed "
        f"{args.seed}: {len(faults)} faults"
    )
    return int(bool(faults))


def _flip_faults(args: argparse.Namespace) -> Iterator[str]:
    """The flips and steps, shared among the layouts."""
    flips, clean = -(-args.flips // len(CASES)), -(-args.clean // len(CASES))
    for name, case in CASES.items():

        def body(rank: int, store: Store, case: FlipCase = case) -> list[str]:
            return campaign(case, rank, store, flips, clean, args.seed)

        for wrong in run_on(case.ranks, body, 3600)[:1]:
            yield from (f"{name}: {line}" for line in wrong)


if __name__ == "__main__":
    sys.exit(main())
