"""Draw a run's loss, learning rate, gradient norm and throughput: one picture and one page."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dir", metavar="RUN_DIR", type=Path, help="the run's directory, such as runs/NAME"
    )
    parser.add_argument(
        "--against", metavar="RUN_DIR", type=Path, help="draw another run's loss too, and compare"
    )
    parser.add_argument(
        "--gpu",
        metavar="NAME|FILE.yaml",
        help="put what `megallama plan` predicts for this machine beside the run",
    )
    parser.add_argument(
        "--json", metavar="PATH", type=Path, help="also write the table's figures here"
    )


def run(args: argparse.Namespace) -> int:
    """Writes RUN_DIR/report/{loss.png,index.html} and prints the page's path."""
    import json

    from megallama.cli.report_prediction import predict_run
    from megallama.errors import EXIT_DONE
    from megallama.files import refuse_overwriting, write_atomic
    from megallama.train.comparison import compare
    from megallama.train.record import CONFIG, METRICS, read_run, summarise
    from megallama.train.report import write_report

    if args.json is not None:
        refuse_overwriting([args.json], [args.run_dir / name for name in (METRICS, CONFIG)])
    run = read_run(args.run_dir)
    comparison = compare(run, read_run(args.against)) if args.against else None
    predicted = predict_run(run, args.run_dir, args.gpu) if args.gpu else None
    words = predicted.words(run) if predicted else ""
    beside = predicted.beside(run) if predicted else None
    print(write_report(args.run_dir, run, comparison, words, beside))
    for line in filter(None, (comparison, words)):
        print(line)
    if args.json is not None:
        more = (comparison.figures() if comparison else {}) | (
            predicted.figures() if predicted else {}
        )
        write_atomic(args.json, json.dumps(summarise(run) | more, indent=2).encode() + b"\n")
    return EXIT_DONE
