"""Damage to a run's newest checkpoint: it is named, and the one before is resumed from."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from megallama.checkpoint.rank_file import Rectangle
from megallama.checkpoint.store import (
    begin_checkpoint,
    checkpoint_path,
    commit_checkpoint,
    write_rank,
)
from megallama.config.schema import Config
from megallama.errors import UserError
from megallama.train.build import build_dataset, build_trainer
from megallama.train.meeting import Meeting
from megallama.train.process import ALONE
from megallama.train.resume import begin, candidates
from megallama.train.snapshot import Progress, snapshot
from tests.harness import flat
from tests.mutations.damage import FAULTS, Others, Region, replaced

OLD, NEW = 3, 6
FILES = ("manifest.json", "rank-00000.safetensors", "rank-00001.safetensors")


class Victim:
    """A run with two checkpoints, and a trainer that resumes it again and again."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.trainer, self.dataset = build_trainer(config), build_dataset(config)
        self.folder = config.run.directory / "checkpoints"
        self.states = {step: self._save(step) for step in (OLD, NEW)}
        self.older, self.newest = (checkpoint_path(self.folder, step) for step in (OLD, NEW))

    def _save(self, step: int) -> torch.Tensor:
        """A checkpoint as two ranks write it, which divide the rows of every tensor."""
        generator = torch.Generator().manual_seed(step)
        for tensor in self._tensors().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        state = snapshot(self.trainer, Progress(step=step, samples=4 * step), self.dataset)
        halves: list[list[Rectangle]] = [[], []]
        for whole in state.rectangles:
            middle = len(whole.data) // 2
            for half, rows in zip(halves, (slice(0, middle), slice(middle, None)), strict=True):
                start = (rows.start, *whole.start[1:])
                half.append(replace(whole, start=start, data=whole.data[rows]))
        directory = checkpoint_path(self.folder, step)
        begin_checkpoint(directory)
        texts = [write_rank(directory, rank, half) for rank, half in enumerate(halves)]
        commit_checkpoint(directory, texts, state.facts)
        return flat(self._tensors())

    def _tensors(self) -> dict[str, torch.Tensor]:
        optimizer = self.trainer.optimizer
        kinds = (self.trainer.model.state.masters, optimizer.exp_avg, optimizer.exp_avg_sq)
        return {f"{i}/{name}": t for i, kind in enumerate(kinds) for name, t in kind.items()}

    def resume(self) -> tuple[int, list[str]]:
        """The step that a new start goes on from, bit for bit, or -1; and what it said."""
        said: list[str] = []
        meeting = Meeting(ALONE)
        paths = candidates(self.config.run.directory, "auto", meeting)
        _, progress = begin(self.trainer, paths, self.dataset, meeting, said.append)
        right = flat(self._tensors()).equal(self.states.get(progress.step, torch.empty(0)))
        return progress.step if right else -1, said


def regions(name: str, raw: bytes) -> dict[str, Region]:
    """The parts of a file."""
    if name == "manifest.json":
        marks = ["state", "config", "tokenizer_hash", "sources", "tensors", "files", "xxh3"]
        places = [0, *(raw.rindex(f'\n "{mark}": '.encode()) for mark in marks), len(raw)]
        return {
            part: Region(a, b)
            for part, a, b in zip(["format", *marks], places, places[1:], strict=False)
        }
    data = 8 + int.from_bytes(raw[:8], "little")
    tensors = raw.index(b'},"') if b'},"' in raw[:data] else data // 2
    third = (len(raw) - data) // 3
    return {
        "length": Region(0, 8),
        "slices": Region(8, tensors),
        "tensors": Region(tensors, data),
        "first data": Region(data, data + third),
        "data": Region(data + third, data + 2 * third),
        "last data": Region(data + 2 * third, len(raw)),
    }


def mutations(victim: Victim) -> Iterator[tuple[str, str, str]]:
    """Every file × region × fault, by their names."""
    for name in FILES:
        for region in regions(name, (victim.newest / name).read_bytes()):
            for fault in FAULTS:
                yield name, region, fault


def accepted(
    victim: Victim, mutation: tuple[str, str, str], generator: random.Random
) -> str | None:
    """Damage the newest checkpoint, resume, and mend it. What is wrong with the answer, or nothing;
    None where the fault changed no byte."""
    name, region, fault = mutation
    path = victim.newest / name
    whole = path.read_bytes()
    sibling = victim.newest / FILES[(FILES.index(name) + 1) % len(FILES)]
    others = Others((victim.older / name).read_bytes(), sibling.read_bytes())
    damaged = FAULTS[fault](whole, regions(name, whole)[region], others, generator)
    if damaged == whole:
        return None
    with replaced(path, damaged):
        if damaged == others.older and name == "manifest.json":
            path = victim.newest  # it is whole, and what is beside it is not what it says
        return _judged(victim, path, gone=damaged is None)


def _judged(victim: Victim, path: Path, gone: bool) -> str:
    try:
        step, said = victim.resume()
    except UserError as error:
        return f"ended the run: {error}"
    except Exception as error:
        return f"is a bug: {error!r}"
    if step != OLD:
        return f"was accepted, with the state of step {step}"
    if gone and path.name == "manifest.json":
        return ""  # an unfinished checkpoint, which is none
    named = [line for line in said if re.search(rf"{re.escape(str(path))}(/[^ /]+)?: ", line)]
    return "" if named and len(said) == 2 else f"was not named: {said}"
