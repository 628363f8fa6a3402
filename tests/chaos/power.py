"""Power loss: from every point of a course of saves, what may be left must hold a checkpoint.

    python -m tests.chaos.power --n 1000 --seed 1

cuts the power N times, at points drawn with the seed, and prints what was lost; 1 is the exit code
where anything was.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megallama.checkpoint.manifest import Manifest
from megallama.checkpoint.rank_file import Rectangle
from megallama.checkpoint.store import (
    Checkpoint,
    begin_checkpoint,
    checkpoint_path,
    commit_checkpoint,
    committed_checkpoints,
    prune_checkpoints,
    write_rank,
)
from megallama.errors import UserError
from megallama.files import Disk
from tests.chaos.disks import Operation, Platter, Recorder

DISK = Disk()
RANKS, STEPS = 2, (2, 4, 8, 10)
#: Kept for ever: 8.
KEEP, KEEP_EVERY = 1, 8


class Course(NamedTuple):
    """What was done under `root`, and after how many operations which step was saved."""

    root: Path
    log: list[Operation]
    saved: list[tuple[int, int]]


def tensors(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "master/w": torch.randn(4, 3, generator=generator),
        "master/n": torch.randn(8, generator=generator).bfloat16(),
    }


def save(folder: Path, step: int, disk: Disk) -> None:
    """What ranks and their leader do, in turn: each has half of the rows of every tensor."""
    directory = checkpoint_path(folder, step)
    begin_checkpoint(directory, 1 << 10, disk)
    texts = []
    for rank in range(RANKS):
        mine = []
        for name, whole in tensors(step).items():
            rows = len(whole) // RANKS
            start = (rank * rows, *(0,) * (whole.dim() - 1))
            part = whole[rank * rows : (rank + 1) * rows]
            mine.append(Rectangle(name, tuple(whole.shape), start, part))
        texts.append(write_rank(directory, rank, mine, disk))
    commit_checkpoint(directory, texts, Manifest({"step": step}, {}, None, {}), disk)
    prune_checkpoints(folder, KEEP, directory, KEEP_EVERY, disk)


def record(root: Path, make: Callable[[], Recorder] = Recorder) -> Course:
    """Several saves; before that of step 8 an unfinished one of its step is in the way."""
    disk, saved = make(), []
    folder = root / "runs" / "name" / "checkpoints"
    root.mkdir()
    for step in STEPS:
        if step == 8:
            begin_checkpoint(checkpoint_path(folder, step), 0, disk)
            mine = [Rectangle("master/x", (2,), (0,), torch.ones(2))]
            write_rank(checkpoint_path(folder, step), 1, mine, disk)
        save(folder, step, disk)
        saved.append((len(disk.log), step))
    return Course(root, disk.log, saved)


def lost(course: Course, cut: int, generator: random.Random) -> str:
    """What is wrong after a power failure behind the first `cut` operations; empty: nothing.

    Every directory with a manifest must be whole, and the newest be no older than the last save
    that had returned.
    """
    platter = Platter(course.root)
    for operation in course.log[:cut]:
        platter.do(operation)
    with tempfile.TemporaryDirectory() as place:
        platter.fail(generator, Path(place) / "root")
        found = committed_checkpoints(Path(place) / "root" / "runs" / "name" / "checkpoints")
        steps = [int(path.name[5:]) for path in found]
        done = [step for end, step in course.saved if end <= cut]
        if done and (not steps or steps[-1] < done[-1]):
            return f"step {done[-1]} was saved, and {steps} are there"
        for path, step in zip(found, steps, strict=True):
            try:
                checkpoint = Checkpoint(path)
                checkpoint.verify()
            except UserError as error:
                return str(error)
            for name, whole in tensors(step).items():
                if not checkpoint.read(name).equal(whole):
                    return f"{path}: {name} is that of another step"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=1000, help="power failures (default 1000)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        course = record(Path(folder) / "root")
        for number in range(given.n):
            generator = random.Random(f"{given.seed}/{number}")
            cut = generator.randint(0, len(course.log))
            fault = lost(course, cut, generator)
            if fault:
                faults += 1
                print(f"seed {given.seed}, failure {number}, after {cut} operations: {fault}")
    print(f"{given.n} power failures in {len(course.log)} operations: {faults} lost something")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
