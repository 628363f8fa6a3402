"""Every pair of layouts: saved at one, loaded at the other, to the same state and the same losses.

    python -m tests.chaos.pairs

saves one state at every layout, loads every checkpoint at every layout, and prints which pairs
differ; 1 is the exit code where any does. One launch of a layout loads what all others saved.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from megallama.checkpoint.store import Checkpoint
from megallama.config.load import parse_config
from megallama.config.schema import Config
from megallama.data.build import build
from megallama.data.tokenizer import train_tokenizer
from megallama.optim.schedule import learning_rate
from megallama.train.build import Trainer, build_dataset, build_trainer
from megallama.train.meeting import Meeting
from megallama.train.process import Process
from megallama.train.snapshot import Progress, restore, save
from tests.layouts.pool import ADDRESS, Pool, Seat, Task

#: Tensor, data and pipeline ranks, and the schedule: all ways to write 1, 2 and 4, and 8 in five.
LAYOUTS: dict[str, tuple[int, int, int, str]] = {
    "1": (1, 1, 1, "1f1b"),
    "t2": (2, 1, 1, "1f1b"),
    "d2": (1, 2, 1, "1f1b"),
    "p2 interleaved": (1, 1, 2, "interleaved"),
    "t4": (4, 1, 1, "1f1b"),
    "d4": (1, 4, 1, "1f1b"),
    "p4": (1, 1, 4, "zb-h1"),
    "t2 d2": (2, 2, 1, "1f1b"),
    "t2 p2 zb-v": (2, 1, 2, "zb-v"),
    "d2 p2": (1, 2, 2, "1f1b-fused"),
    "t2 d2 p2": (2, 2, 2, "interleaved"),
    "t4 d2": (4, 2, 1, "1f1b"),
    "d8": (1, 8, 1, "1f1b"),
    "t2 p4": (2, 1, 4, "1f1b"),
    "d4 p2 zb-v": (1, 4, 2, "zb-v"),
}
SMALL = tuple(name for name, (t, d, p, _) in LAYOUTS.items() if t * d * p <= 4)
#: Where every run stands: a sample number within the corpus, and not at its begin.
PROGRESS = Progress(step=3, samples=24, tokens=999, updates=3, skipped=1)
BATCH, LENGTH, VOCAB = 8, 16, 300
BOUND = 1e-6


class Seen(NamedTuple):
    """What one rank saw of one checkpoint: tensors that differ, samples it took, and losses."""

    different: list[str]
    samples: list[tuple[int, bytes]]
    losses: list[float]


def make_data(folder: Path) -> None:
    """A tokenizer and the token files of one source."""
    generator = np.random.default_rng(0)
    words = "def return if else for in x y sum len (a, b): + 12 = None"
    text = folder / "corpus.jsonl"
    lines = (
        " ".join(generator.choice(words.split(), generator.integers(5, 40))) for _ in range(100)
    )
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    train_tokenizer([text], VOCAB, folder / "tokenizer.model")
    build([text], folder / "tokenizer.model", folder / "corpus", "text", 1)


def config_of(layout: str, folder: Path) -> Config:
    """Odd numbers of rows, more tensor ranks than key/value heads, and tied ends."""
    tensor, data, pipeline, schedule = LAYOUTS[layout]
    return parse_config(
        {
            "run": {"name": "pairs", "root": str(folder)},
            "model": {
                "d_model": 24,
                "layers": 4,
                "heads": 4,
                "kv_heads": 2,
                "ffn": 20,
                "vocab": VOCAB + 1,
                "tie_embeddings": True,
            },
            "train": {
                "steps": 100,
                "sequence_length": LENGTH,
                "global_batch": BATCH,
                "micro_batch": 1,
                "precision": "fp64",
            },
            "parallel": {
                "tensor": tensor,
                "data": data,
                "pipeline": pipeline,
                "schedule": schedule,
            },
            "optimizer": {"lr": 1e-3, "eps": 1e-5, "warmup_steps": 0},
            "data": {
                "tokenizer": str(folder / "tokenizer.model"),
                "mixture": [{"name": "corpus", "path": str(folder / "corpus"), "weight": 1}],
            },
            "validation": {"every": 0},
        }
    )


@contextmanager
def built(seat: Seat, layout: str, folder: Path) -> Iterator[tuple[Trainer, Meeting]]:
    store = seat.store if seat.size > 1 else None
    process = Process(seat.rank, seat.size, seat.rank, seat.size, store, ADDRESS)
    trainer = build_trainer(config_of(layout, folder), process, strict=True)
    try:
        yield trainer, Meeting(process, "pairs")
    finally:
        trainer.groups.close()


def value(kind: str, name: str, shape: Sequence[int]) -> Tensor:
    """A global tensor of the state, the same on every rank of every layout."""
    generator = torch.Generator().manual_seed(crc32(f"{kind}/{name}".encode()))
    whole = torch.randn(list(shape), generator=generator, dtype=torch.float64) * 0.1
    return whole.square() if kind == "exp_avg_sq" else whole + (name.endswith("norm.weight"))


def each(trainer: Trainer) -> Iterator[tuple[str, Tensor, Tensor]]:
    """All that this rank holds of the state, and what it should be."""
    optimizer = trainer.optimizer
    kinds: Mapping[str, Mapping[str, Tensor]] = {
        "master": trainer.model.state.masters,
        "exp_avg": optimizer.exp_avg,
        "exp_avg_sq": optimizer.exp_avg_sq,
    }
    for kind, tensors in kinds.items():
        for piece, tensor in trainer.model.state.pieces(tensors):
            wanted = value(kind, piece.part.name, piece.part.shape)[piece.region]
            yield f"{kind}/{piece.part.name}", tensor, wanted


def save_at(seat: Seat, layout: str, folder: Path) -> None:
    """One rank saves the state."""
    with built(seat, layout, folder) as (trainer, meeting):
        with trainer.zero.changing_masters():
            for _, tensor, wanted in each(trainer):
                tensor.copy_(wanted)
        save(trainer, PROGRESS, folder / layout, build_dataset(trainer.config), meeting)


def load_at(
    seat: Seat, layout: str, folder: Path, sources: Sequence[str], steps: int
) -> dict[str, Seen]:
    """One rank loads what the sources saved, one after the other, and trains on."""
    with built(seat, layout, folder) as (trainer, _):
        return {source: _load(trainer, folder / source, steps) for source in sources}


def _load(trainer: Trainer, source: Path, steps: int) -> Seen:
    dataset = build_dataset(trainer.config)
    with trainer.zero.changing_masters():
        for _, tensor, _ in each(trainer):
            tensor.fill_(math.nan)
    progress = restore(trainer, Checkpoint(next(source.iterdir())), dataset)
    different = [name for name, tensor, wanted in each(trainer) if not tensor.equal(wanted)]
    if progress != PROGRESS or trainer.optimizer.updates != PROGRESS.updates:
        different.append("the counters")
    place, samples, losses = trainer.place, [], []
    count = BATCH // place.grid.data
    for step in range(progress.step, progress.step + steps):
        first = progress.samples + count * place.along("data")
        batch = dataset.batch(first, count)
        samples += [(first + i, row.tobytes()) for i, row in enumerate(batch.tokens_NS)]
        lr = learning_rate(trainer.config.optimizer, step + 1, 100)
        losses.append(trainer.step.run(batch, lr).loss)
        progress.samples += BATCH
    return Seen(different, samples, losses)


def faults_of(pool: Pool, folder: Path, names: Sequence[str], steps: int) -> list[str]:
    """What differs, for every pair of the layouts."""

    def ranks(layout: str) -> int:
        return math.prod(LAYOUTS[layout][:3])

    def all_of(work: Callable[..., Any], *more: Any) -> Iterator[tuple[str, list[Any]]]:
        tasks = [Task(ranks(name), work, (name, folder, *more)) for name in names]
        for number, outcome in pool.run_all(tasks):
            if outcome.error:
                raise RuntimeError(f"{names[number]}: {outcome.error}")
            yield names[number], outcome.results

    make_data(folder)
    list(all_of(save_at))
    seen = dict(all_of(load_at, names, steps))
    reference = seen["1"][0]["1"]
    faults = []
    for target, results in seen.items():
        for source in names:
            faults += [
                f"{source} → {target}: {fault}"
                for fault in _differences([rank[source] for rank in results], reference)
            ]
    return faults


def _differences(ranks: Sequence[Seen], reference: Seen) -> Iterator[str]:
    for rank, seen in enumerate(ranks):
        if seen.different:
            yield f"rank {rank}: {', '.join(seen.different)} differ"
        apart = [abs(a - b) for a, b in zip(seen.losses, reference.losses, strict=True)]
        if not all(difference <= BOUND for difference in apart):  # NaN is not
            yield f"rank {rank}: losses differ by {', '.join(f'{d:.2e}' for d in apart)}"
    if set().union(*(seen.samples for seen in ranks)) != set(reference.samples):
        yield "other samples"


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, Pool(seconds=3600) as pool:
        faults = faults_of(pool, Path(folder), list(LAYOUTS), steps=10)
    print(*faults, sep="\n")
    print(f"{len(LAYOUTS) ** 2} pairs of {len(LAYOUTS)} layouts: {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
