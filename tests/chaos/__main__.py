"""A campaign of random cases: `python -m tests.chaos --n 100 --seed 0`; `--help` for the rest."""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed import Store

from megallama.data.build import build
from megallama.data.tokenizer import train_tokenizer
from tests.chaos.flips import CASES, campaign
from tests.chaos.kills import Case, draw, parse
from tests.chaos.runs import Arena
from tests.conftest import SOURCES, VOCAB, TinyData
from tests.dist.commands import write_config
from tests.dist.processes import run_on


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--n", type=int, default=100, help="cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--signal", default="SIGKILL", choices=["SIGKILL", "SIGTERM", "SIGUSR1", "SIGSTOP"]
    )
    parser.add_argument("--at-once", type=int, default=3, help="cases side by side")
    parser.add_argument("--case", help="this case alone, as a failing one is printed")
    parser.add_argument("--flips", type=int, default=0, help="instead: bits to flip in replicas")
    parser.add_argument("--clean", type=int, default=0, help="and steps without a flip")
    args = parser.parse_args()
    torch.set_num_threads(1)
    return _flips(args) if args.flips or args.clean else _fight(args)


def _fight(args: argparse.Namespace) -> int:
    generator = random.Random(args.seed)
    kind = signal.Signals[args.signal]
    cases = [parse(args.case)] if args.case else [draw(generator, kind) for _ in range(args.n)]
    began, faulty, fell, places = time.monotonic(), 0, 0, {"save": 0, "recovery": 0, "steps": 0}
    with tempfile.TemporaryDirectory(prefix="megallama-chaos-") as name:
        folder = Path(name)
        config = write_config(folder, _data(folder / "data"), **SECTIONS)
        for outcome in Arena(folder, config).fight(cases, args.at_once):
            fell += outcome.fell
            for blow in outcome.case.blows[: outcome.fell]:
                places[_place(blow.point)] += 1
            if outcome.faults:
                faulty += 1
                print(f"FAULTY: --case '{outcome.case}'", *outcome.faults, sep="\n  ", flush=True)
    layouts = len({case.layout for case in cases})
    where = ", ".join(f"{count} in {place}" for place, count in places.items())
    print(
        f"{len(cases)} cases of {args.signal} at {layouts} layouts, seed {args.seed}: {fell} "
        f"signals fell ({where}); {faulty} cases faulty; {time.monotonic() - began:.0f} s"
    )
    return int(faulty > 0)


#: What the runs have beside the words of a layout.
SECTIONS = {
    "model": {"layers": 4},
    "train": {"precision": "fp32"},
    "validation": {"every": 4, "sequences": 2},
}


def _place(point: str) -> str:
    kind = point.partition("-")[0]
    return {"recovery": "recovery", "save": "save", "retention": "save"}.get(kind, "steps")


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

        def body(rank: int, store: Store, case: Case = case) -> list[str]:
            return campaign(case, rank, store, flips, clean, args.seed)

        for wrong in run_on(case.ranks, body, 3600)[:1]:
            yield from (f"{name}: {line}" for line in wrong)


if __name__ == "__main__":
    sys.exit(main())
