"""Checkpoints beside a raw copy of their bytes and beside torch.distributed.checkpoint.

    python benchmarks/checkpoints.py [--json F] [--rounds N] [--ranks N …] [--folder DIR] [--quick]

The state of training ranks (fp32 masters and moments of 67M parameters, 0.75 GiB in all) is saved
and loaded in several ways that take turns, round after round, in the same processes: one, then two
on gloo that share the state by rows. A time is from an agreed start until the last rank is done.

raw: the bytes as one file a rank, written and fsynced; read in blocks into one buffer.
megallama: as a run saves: hashed, written, synced, read back past the page cache, committed; loads
    verify every byte. Without hashes nothing is hashed or compared. Not read back: a rank's file
    written, hashed and synced, as if that were all.
dcp: torch.distributed.checkpoint's save and load, which hash nothing and read nothing back.

cold: the files' pages were dropped before (posix_fadvise); `resident` is the share that was left.
The disk may have a cache of its own, which nobody here empties. warm: the files were read just
before. Behind the steps: `held` is how long the save keeps the first step waiting, `slowed` how
much longer a few steps take with a save under way than without, `held` left out. dcp's async_save
is timed with a stager that is kept, and by default. Figures are medians over rounds, ratios are
medians of the ratios within a round; a first round is left out, and so are first times.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from checkpoint_rank import BEHIND, LOADED_FROM, SAVES, Rank
from pipeline_rank import Ranks
from reporting import about, save, spread

MODEL = dict(d_model=768, layers=6, heads=12, ffn=2048, vocab=16_128)
TRAIN = dict(steps=1000, sequence_length=256, global_batch=2, precision="bf16")
QUICK = MODEL | dict(d_model=64, layers=2, heads=2, ffn=128, vocab=512)
RANKS, ROUNDS = (1, 2), 5
#: Steps that a save behind them is timed over, unless it takes longer.
STEPS = 4
#: Seconds from one checkpoint to the next, of which a save behind the steps takes a share.
INTERVAL = 600.0

Row = dict[str, Any]
Seconds = dict[str, list[float]]


def config_of(ranks: int, quick: bool) -> Row:
    """What the ranks train."""
    return dict(
        model=QUICK if quick else MODEL,
        train=TRAIN,
        parallel=dict(data=ranks),
        optimizer=dict(lr=1e-4),
        checkpoint=dict(every=1, keep=1),
    )


def measure(size: int, rounds: int, folder: str, quick: bool) -> Row:
    """Everything, in `size` processes."""
    with Ranks(size, partial(Rank, config_of(size, quick), folder)) as ranks:
        total = sum(ranks.ask("size_bytes"))
        saves, loads, left = files(ranks, rounds)
        behind, first = steps(ranks, rounds, 2 if quick else STEPS)
    gib = total / 2**30
    return {
        "ranks": size,
        "gib": round(gib, 4),
        "saves": {way: figures(saves, way, gib) for way in saves},
        "cold_loads": {way: figures(loads["cold"], way, gib) for way in loads["cold"]},
        "resident_before_cold_loads": round(max(left), 4),
        "warm_loads": {way: figures(loads["warm"], way, gib) for way in loads["warm"]},
        "hashes": {
            "of_a_save": cost(saves),
            "of_a_cold_load": cost(loads["cold"]),
            "of_a_warm_load": cost(loads["warm"]),
        },
        "behind_the_steps": {
            way: behind_figures(behind, way, gib / size) | {"first_held": first[way]}
            for way in BEHIND
        },
        "seconds_of_the_steps_alone": spread(stepped for _, stepped, _ in behind["none"]),
    }


def files(ranks: Ranks, rounds: int) -> tuple[Seconds, dict[str, Seconds], list[float]]:
    """Seconds of saves and loads by way, and what was left in memory before cold loads."""
    saves: Seconds = {way: [] for way in SAVES}
    loads: dict[str, Seconds] = {t: {way: [] for way in LOADED_FROM} for t in ("cold", "warm")}
    left: list[float] = []
    for turn in range(rounds + 1):
        for way in rotated(list(SAVES), turn):
            ranks.ask("clean")
            seconds = max(ranks.ask("save", way=way))
            if turn:
                saves[way].append(seconds)
            for reader in (r for r, written in LOADED_FROM.items() if written == way):
                if not turn and reader != "raw":
                    assert all(ranks.ask("brings_back", way=reader)), f"{reader} lost a bit"
                left.append(max(ranks.ask("forget")))
                for temperature in loads:
                    seconds = max(ranks.ask("load", way=reader))
                    if turn:
                        loads[temperature][reader].append(seconds)
    ranks.ask("clean")
    return saves, loads, left


def steps(
    ranks: Ranks, rounds: int, count: int
) -> tuple[dict[str, list[tuple[float, ...]]], dict[str, float]]:
    """By way, of every round: seconds held, of the steps, and until the save was done. And how
    long the first save of each way held the steps."""
    found: dict[str, list[tuple[float, ...]]] = {way: [] for way in ("none", *BEHIND)}
    first: dict[str, float] = {}
    for turn in range(rounds + 1):
        for way in rotated(list(found), turn):
            ranks.ask("clean")
            answers = ranks.ask("steps", way=way, count=count)
            held, stepped, done = (max(times) for times in zip(*answers, strict=True))
            if turn:
                found[way].append((held, stepped, done))
            else:
                first[way] = round(held, 5)
                # Steps go on until every save is done, or `slowed` would leave some of it out.
                count = max(count, math.ceil(count * done / stepped))
    ranks.ask("clean")
    return found, first


def rotated(ways: Sequence[str], turn: int) -> list[str]:
    """Each round begins with another."""
    turn %= len(ways)
    return [*ways[turn:], *ways[:turn]]


def figures(seconds: Seconds, way: str, gib: float) -> Row:
    """One way to save or load, beside the raw copy and dcp."""
    return {
        "seconds": spread(seconds[way]),
        "gib_per_second": round(gib / statistics.median(seconds[way]), 3),
        "speed_over_raw": ratio(seconds["raw"], seconds[way]),
        "speed_over_dcp": ratio(seconds["dcp"], seconds[way]),
    }


def behind_figures(found: dict[str, list[tuple[float, ...]]], way: str, gib: float) -> Row:
    """`gib`: of a rank's state, which is what a step waits for."""
    rows = found[way]
    held = statistics.median(held for held, _, _ in rows)
    pairs = zip(rows, found["none"], strict=True)
    slowed = spread(stepped - held - alone for (held, stepped, _), (_, alone, _) in pairs)
    return {
        "held_seconds": spread(held for held, _, _ in rows),
        "held_seconds_per_gib_of_a_rank": round(held / gib, 4),
        "held_share_of_10_minutes": round(held / INTERVAL, 7),
        "slowed_seconds": slowed,
        "held_and_slowed_share_of_10_minutes": round((held + slowed["median"]) / INTERVAL, 7),
        "seconds_of_steps_and_save": spread(done for _, _, done in rows),
    }


def cost(seconds: Seconds) -> float:
    """Of the hashes: how much longer megallama takes with them."""
    return round(ratio(seconds["megallama"], seconds["megallama without hashes"]) - 1, 4)


def ratio(these: Sequence[float], those: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(these, those, strict=True)), 3)


def show(row: Row) -> None:
    """The figures as text."""
    print(f"\n{row['ranks']} ranks, {row['gib']:.2f} GiB")
    for part in ("saves", "cold_loads", "warm_loads"):
        for way, f in row[part].items():
            print(
                f"{part.replace('_', ' '):11} {way:25} {f['gib_per_second']:6.2f} GiB/s, "
                f"{f['speed_over_raw']:5.2f} of the raw copy, {f['speed_over_dcp']:5.2f} of dcp"
            )
    for way, f in row["behind_the_steps"].items():
        print(
            f"behind      {way:25} holds {f['held_seconds']['median']:.3f} s "
            f"({f['held_share_of_10_minutes']:.3%} of 10 minutes), slows "
            f"{f['slowed_seconds']['median']:.2f} s"
        )
    print("hashes", ", ".join(f"{name} {share:+.1%}" for name, share in row["hashes"].items()))


def file_system(folder: str) -> Row:
    """What the figures were written to."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    here = Path(folder).resolve()
    inside = [m for m in mounts if here.is_relative_to(m[1])]
    device, _, kind, options = max(inside, key=lambda mount: len(mount[1]))[:4]
    return {"type": kind, "device": device, "options": options}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="on the disk to measure")
    parser.add_argument("--quick", action="store_true", help="a tiny state: for a trial")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    results = []
    for size in args.ranks:
        with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=args.folder) as folder:
            results.append(measure(size, args.rounds, f"{folder}/written", args.quick))
        show(results[-1])
    report = about("checkpoints.py") | {
        "file_system": file_system(str(args.folder)),
        "model": QUICK if args.quick else MODEL,
        "train": TRAIN,
        "rounds": args.rounds,
        "interval_seconds": INTERVAL,
        "results": results,
    }
    report["hardware"] |= dict(threads_each=1)
    save(args.json, report)


if __name__ == "__main__":
    main()
