"""Steps that the planner predicts for this machine, beside the same steps run on it.

    python benchmarks/predictions.py [--json F] [--machine FILE] [--steps N] [--only TEXT]

First `megallama doctor --calibrate` measures the machine with two workers, unless --machine names a
file that it wrote. Then each combination is predicted from that file and run by `megallama bench`:
two workers of one thread each. The figure is the prediction's distance from the median step.

Memory: predicted are the bytes of the rank whose tensors are most, by the ledger; held is what its
tensors really were at the worst moment of a step of its own, counted as the tests count them. The
resident process is there too: it has the interpreter and PyTorch in it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from megallama.config.load import load_config
from megallama.config.schema import Config
from megallama.plan.hardware import Hardware, load_hardware
from megallama.plan.ledger import ledger
from megallama.plan.predict import predict
from megallama.spec.grid import make_grid
from megallama.train.bench import batches
from megallama.train.build import build_trainer
from megallama.train.doctor import processor, versions
from megallama.train.process import Process
from tests.dist.processes import LOCAL, run_on
from tests.memory import counted

RANKS = 2
MIB = 1 << 20
MODELS = {
    "D=512, 4 layers": {"d_model": 512, "layers": 4, "heads": 8, "kv_heads": 8, "ffn": 1376},
    "D=256, 6 layers": {"d_model": 256, "layers": 6, "heads": 4, "kv_heads": 4, "ffn": 688},
    "D=768, 4 layers": {"d_model": 768, "layers": 4, "heads": 12, "kv_heads": 4, "ffn": 2048},
}
VOCAB, LENGTH, GLOBAL_BATCH = 8192, 512, 8
#: (model, keys)
COMBINATIONS = (
    ("D=512, 4 layers", "parallel.tensor=2"),
    ("D=512, 4 layers", "parallel.tensor=2 parallel.overlap=none"),
    ("D=512, 4 layers", "parallel.tensor=2 train.saved_activations=layer_input"),
    ("D=512, 4 layers", "parallel.pipeline=2"),
    ("D=512, 4 layers", "parallel.pipeline=2 parallel.schedule=zb-h1 train.micro_batch=1"),
    ("D=512, 4 layers", "parallel.data=2"),
    ("D=512, 4 layers", "parallel.data=2 train.saved_activations=no_gate_up"),
    ("D=256, 6 layers", "parallel.data=2 train.micro_batch=4"),
    ("D=256, 6 layers", "parallel.tensor=2 train.micro_batch=4"),
    ("D=256, 6 layers", "parallel.pipeline=2 parallel.schedule=gpipe"),
    ("D=768, 4 layers", "parallel.data=2 train.saved_activations=all"),
    ("D=768, 4 layers", "parallel.pipeline=2"),
    ("D=768, 4 layers", "parallel.tensor=2 parallel.overlap=full"),
    ("D=768, 4 layers", "parallel.tensor=2 train.saved_activations=no_attention_output"),
)


def config_of(model: str) -> dict[str, Any]:
    return {
        "run": {"name": "predictions"},
        "model": {"vocab": VOCAB, **MODELS[model]},
        "optimizer": {"lr": 1e-4},
        "train": {
            "steps": 1000,
            "sequence_length": LENGTH,
            "global_batch": GLOBAL_BATCH,
            "micro_batch": 2,
            "precision": "bf16",
        },
    }


def megallama(*words: str) -> None:
    """Run a command of megallama's; each worker has one thread."""
    main = "from megallama.cli.main import main; raise SystemExit(main())"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-c", main, *words], env=environment, check=True, stdout=subprocess.DEVNULL
    )


def measure(path: Path, layouts: list[str], steps: int, folder: Path) -> list[dict[str, Any]]:
    figures = folder / "figures.json"
    asked = [word for layout in layouts for word in ("--layout", layout)]
    megallama(
        *("bench", str(path), "--nproc", str(RANKS), "--steps", str(steps), "--warmup", "2"),
        *("--json", str(figures), *asked),
    )
    found: list[dict[str, Any]] = json.loads(figures.read_text())["layouts"]
    return found


def held(config: Config) -> int:
    """The most bytes of tensors that a rank has in its second step."""

    def body(rank: int, store: Any) -> int:
        with counted() as counter:
            trainer = build_trainer(config, Process(rank, RANKS, rank, RANKS, store, LOCAL))
            batch_of = batches(config, None, trainer.place)
            try:
                trainer.step.run(batch_of(0), config.optimizer.lr)
                counter.reset()
                trainer.step.run(batch_of(1), config.optimizer.lr)
            finally:
                trainer.groups.close()
        return counter.peak

    return max(run_on(RANKS, body))


def chosen(only: str) -> dict[str, list[str]]:
    """By model the layouts of the rows that have this text."""
    found: dict[str, list[str]] = {}
    for model, keys in COMBINATIONS:
        if only in f"{model} {keys}":
            found.setdefault(model, []).append(keys)
    return found


def beside(
    config: Config, hardware: Hardware, figures: dict[str, Any], held_bytes: int
) -> dict[str, Any]:
    """A row's predicted figures, `megallama bench`'s and the bytes of tensors that were held."""
    prediction, seconds = predict(config, hardware, RANKS), figures["step_seconds"]
    tensors = ledger(config, make_grid(config, RANKS), hardware).largest.held
    return {
        "predicted_seconds": prediction.step_seconds,
        "measured_seconds": seconds,
        "error": prediction.step_seconds / seconds["median"] - 1,
        "predicted_exposed": dict(prediction.exposed),
        "measured_exposed": figures["exposed_seconds"],
        "predicted_tensor_bytes": tensors,
        "held_tensor_bytes": held_bytes,
        "memory_error": tensors / held_bytes - 1,
        "measured_resident_bytes": figures["peak_memory_bytes"],
    }


def line(row: dict[str, Any]) -> str:
    seconds = row["measured_seconds"]
    return (
        f"{row['model']:16} {row['layout']:66} predicted {row['predicted_seconds']:.3f} s, "
        f"measured {seconds['min']:.3f} {seconds['median']:.3f} {seconds['max']:.3f}, "
        f"{row['error']:+.1%}; tensors {row['predicted_tensor_bytes'] / MIB:,.0f} MiB predicted, "
        f"{row['held_tensor_bytes'] / MIB:,.0f} held, {row['memory_error']:+.2%}; "
        f"process {row['measured_resident_bytes'] / MIB:,.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="F")
    parser.add_argument("--machine", type=Path, metavar="FILE")
    parser.add_argument("--steps", type=int, default=7, metavar="N")
    parser.add_argument("--only", default="", metavar="TEXT", help="of a row's model and keys")
    args = parser.parse_args()
    asked = chosen(args.only)
    if not asked:
        raise SystemExit(f"--only {args.only}: is in no row; give 'pipeline=2', say")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        machine = args.machine or folder / "machine.yaml"
        if not args.machine:
            megallama("doctor", "--calibrate", str(machine), "--nproc", str(RANKS))
        hardware = load_hardware(str(machine))
        for model, layouts in asked.items():
            path = folder / "config.yaml"
            path.write_text(yaml.safe_dump(config_of(model)))
            measured = measure(path, layouts, args.steps, folder)
            for keys, figures in zip(layouts, measured, strict=True):
                config = load_config(path, keys.split())
                figures = beside(config, hardware, figures, held(config))
                rows.append({"model": model, "layout": keys, **figures})
                print(line(rows[-1]), flush=True)
        calibrated = yaml.safe_load(machine.read_text())
    errors = [abs(row["error"]) for row in rows]
    memory = max(abs(row["memory_error"]) for row in rows)
    print(f"seconds: mean error {statistics.mean(errors):.1%}, largest {max(errors):.1%}")
    print(f"bytes of tensors: largest error {memory:.2%}")
    if args.json:
        result = {
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.date.today().isoformat(),
            "machine": processor() | {"cores": os.cpu_count()},
            "versions": versions(),
            "calibrated": calibrated,
            "rows": rows,
            "mean_error": statistics.mean(errors),
            "largest_error": max(errors),
            "largest_memory_error": memory,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
