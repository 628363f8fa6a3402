"""Pipeline schedules on processes, measured against their simulation.

    python benchmarks/pipeline_schedules.py [--json F] [--only NAME …] [--quick]

waits: p ranks on gloo run each schedule with sleeps in place of passes (a machine of a few cores
cannot compute p stages at once) and messages of a real size. What is over the simulated time is the
interpreter's, the messages' and the machine's. overhead: the same with passes of no length.
compute: training steps of p = 2, with one thread each, against one process with one thread.

Schedules run in turn, round after round, so that all meet the same load of the machine. Figures are
medians over rounds. A bubble is 1 - a rank's work ÷ the longest rank span, from a rank's own first
pass to its own last; a makespan is from the agreed start to the end of the last pass.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path

from pipeline_figures import Row, passes_over_simulated, steps_row, waits_row
from pipeline_rank import Ranks, Step, Walk, schedule_of
from reporting import about, save, spread

from megallama.config.schedules import default_virtual_stages
from megallama.spec.schedules.build import NAMES

#: Seconds of F, of B and of W of a rank's whole share of a micro-batch, and the bytes of a message.
UNIT, MESSAGE = 0.04, 256 * 1024
#: Pipeline ranks; and micro-batches a rank, with the rounds of each.
STAGES = (4, 8)
PER_STAGE = {2: 3, 4: 2}
#: Sleeps that tell by how much a sleep is late, and micro-batches that passes of no length are
#: timed over.
SLEEPS, MANY = 50, 1000
#: Rounds; with those of the waits the whole takes some 5 minutes.
ROUNDS = dict(overhead=5, compute=5)

#: A stage's F of a micro-batch takes some 50 ms on one core; the vocabulary is small because the
#: head is on one rank alone and the simulation knows of no such difference.
MODEL = dict(d_model=512, layers=4, heads=8, kv_heads=8, ffn=1408, vocab=256)
MICRO_BATCHES = 8
TRAIN = dict(
    steps=1,
    sequence_length=256,
    micro_batch=1,
    global_batch=MICRO_BATCHES,
    precision="fp32",
)
COMPUTED = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-v")
ALONE = "one process"
PARTS = ("waits", "overhead", "compute")


def waits(rounds: Mapping[int, int]) -> Row:
    """Every schedule over waits, by ranks and micro-batches; `rounds` by micro-batches a rank."""
    results: Row = {}
    for p in STAGES:
        with Ranks(p) as ranks:
            ranks.ask("rush", name="gpipe", micro_batches=1, training=True)  # connects the links
            # A sleep ends some 0.1 ms late, 1% of a chunk's pass. A shorter one meets the mark; to
            # spin until then would take the cores from other ranks.
            late = statistics.median(ranks.ask("lateness", seconds=UNIT / 2, count=SLEEPS))
            for n, count in rounds.items():
                results[f"p={p} m={n * p}"] = waits_of(ranks, count, p, n * p, late)
    return dict(unit_seconds=UNIT, message_bytes=MESSAGE, results=results)


def waits_of(ranks: Ranks, rounds: int, p: int, m: int, late: float) -> Row:
    """Every schedule with p ranks and m micro-batches, where a sleep takes `late` more seconds."""
    raw: dict[str, list[Walk]] = {name: [] for name in NAMES}
    for _ in range(rounds):
        for name in NAMES:
            chunk = UNIT / default_virtual_stages(name)
            seconds = dict.fromkeys("FBW", chunk - late) | dict(BW=2 * chunk - late)
            raw[name].append(
                ranks.ask("walk", name=name, micro_batches=m, seconds=seconds, size=MESSAGE)
            )
    return {name: waits_row(schedule_of(name, p, m), UNIT, raw[name]) for name in NAMES}


def overhead(rounds: int, micro_batches: int) -> Row:
    """Microseconds of a pass action, and of a send with its receive, where passes have no length.

    A pass: 1F1B on one rank, which has two a micro-batch and no messages. A message: the forwards
    of two ranks, one pass and one message a micro-batch on each; and 1F1B of two ranks, where a
    rank waits for its answer, two of each.
    """
    seconds: dict[str, list[float]] = {"pass": [], "one way": [], "there and back": []}
    with Ranks(1) as one, Ranks(2) as two:
        for _ in range(rounds + 1):
            arguments = dict(name="1f1b", micro_batches=micro_batches)
            alone = max(one.ask("rush", training=True, **arguments)) / (2 * micro_batches)
            way = max(two.ask("rush", training=False, **arguments)) / micro_batches
            back = max(two.ask("rush", training=True, **arguments)) / (2 * micro_batches)
            seconds["pass"].append(alone)
            seconds["one way"].append(way - alone)
            seconds["there and back"].append(back - alone)
    return dict(
        micro_batches=micro_batches,
        microseconds={
            name: spread((1e6 * value for value in values[1:]), 2)
            for name, values in seconds.items()
        },
    )


def compute(rounds: int) -> Row:
    """Training steps of two ranks, and of one process."""
    raw: dict[str, list[list[Step]]] = {}
    with Ranks(2) as ranks:
        for name in (ALONE, *COMPUTED):
            ranks.ask("build", name=name, config=config_of(name), alone=name == ALONE)
        for turn in range(rounds + 1):
            for name in (ALONE, *COMPUTED):
                answers = ranks.ask("step", name=name)
                if turn:
                    raw.setdefault(name, []).append([a for a in answers if a is not None])
    alone, m = [answers[0][0] for answers in raw[ALONE]], MICRO_BATCHES
    results = {name: steps_row(raw[name], alone, m) for name in raw}
    for name in COMPUTED:
        over = passes_over_simulated(schedule_of(name, 2, m), raw[name])
        results[name]["passes_over_simulated"] = over
    return dict(model=MODEL, train=TRAIN, rounds=rounds, results=results)


def config_of(name: str) -> Row:
    """The run whose steps are timed."""
    parallel = {} if name == ALONE else dict(pipeline=2, schedule=name, stage_layers="even")
    return dict(model=MODEL, train=TRAIN, parallel=parallel, optimizer=dict(lr=1e-4))


def show_waits(results: Mapping[str, Row], per_stage: int) -> None:
    """A Markdown table: a row a schedule, its figures by ranks."""
    chosen = [key for key in results if _counts(key)[1] == per_stage * _counts(key)[0]]
    unit = 1e3 * UNIT
    print(
        f"\nF = B = W = {unit:.0f} ms; simulated → measured; held: the most of any rank, F to B "
        "and B to W, in micro-batches of its whole share\n"
    )
    heads = [f"{key}: bubble | makespan, ms | held" for key in chosen]
    print(f"| schedule | {' | '.join(heads)} |")
    print("|---|" + "---:|---:|---:|" * len(chosen))
    for name in NAMES:
        cells = []
        for row in (results[key][name] for key in chosen):
            simulated, over = row["simulated"], row["makespan_over_simulated"]
            cells += [
                f"{simulated['bubble']:.1%} → {row['bubble']['median']:.1%}",
                f"{1e3 * simulated['makespan']:.0f} → {1e3 * row['makespan']['median']:.0f} "
                f"({over:+.1%})",
                f"{row['peak_in_flight']:g}, {row['peak_weight_states']:g}",
            ]
        print(f"| {name} | {' | '.join(cells)} |")


def show_delays(results: Mapping[str, Row]) -> None:
    """The medians of how late passes begin, and the worst schedule."""
    for key, rows in results.items():
        late = {
            cause: 1e6 * statistics.median(row[f"seconds_after_a_{cause}"] for row in rows.values())
            for cause in ("pass", "message")
        }
        worst = max(rows, key=lambda name: rows[name]["makespan_over_simulated"])
        print(
            f"{key}: at most {rows[worst]['makespan_over_simulated']:+.1%} ({worst}); a pass "
            f"begins {late['pass']:.0f} µs after the rank's own last one, {late['message']:.0f} µs "
            "after the one whose message it waits for"
        )


def show_compute(result: Row) -> None:
    """A Markdown table of the training steps; speed-up over one process."""
    print("\n| p = 2 | s/step | speed-up | F, B, W or BW, ms | passes over simulated |")
    print("|---|---:|---:|---:|---:|")
    for name, row in result["results"].items():
        lengths = ", ".join(
            f"{kind} {1e3 * row['pass_seconds'][kind]['median']:.0f}"
            for kind in ("F", "B", "W", "BW")
            if kind in row["pass_seconds"]
        )
        over = row.get("passes_over_simulated")
        print(
            f"| {name} | {row['step_seconds']['median']:.3f} "
            f"| {row['speedup']['median']:.2f} | {lengths} "
            f"| {'' if over is None else format(over['median'], '+.1%')} |"
        )


def _counts(key: str) -> tuple[int, int]:
    """Ranks and micro-batches of a key such as "p=4 m=8"."""
    p, m = (int(part.partition("=")[2]) for part in key.split())
    return p, m


def measure(args: argparse.Namespace) -> Row:
    """The experiments asked for, each shown as it ends."""
    found: Row = {}
    rounds = {name: 1 if args.quick else count for name, count in ROUNDS.items()}
    if "waits" in args.only:
        of_waits = {2: 1} if args.quick else PER_STAGE
        found["waits"] = waits(of_waits)
        for n in of_waits:
            show_waits(found["waits"]["results"], n)
        print()
        show_delays(found["waits"]["results"])
    if "overhead" in args.only:
        found["overhead"] = overhead(rounds["overhead"], MANY // 10 if args.quick else MANY)
        for name, figures in found["overhead"]["microseconds"].items():
            print(f"overhead, {name}: {figures['median']:.0f} µs")
    if "compute" in args.only:
        found["compute"] = compute(rounds["compute"])
        show_compute(found["compute"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="one round of less: for a trial")
    args = parser.parse_args()
    results = measure(args)
    report = about("pipeline_schedules.py") | results
    report["hardware"] |= dict(threads_each=1)
    save(args.json, report)


if __name__ == "__main__":
    main()
