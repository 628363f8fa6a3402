"""Bits flipped in what ranks hold alike: each must be found at once, named, and none imagined."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import Store

from megallama.train.build import Trainer, build_trainer
from megallama.train.meeting import Meeting
from megallama.train.process import Process
from megallama.train.replicas import Difference, Replicas, odd_ones
from tests.dist.processes import LOCAL
from tests.layouts.case import LR, Case
from tests.layouts.problem import batch, problem_of

#: Layouts in which something is held by several ranks, of every kind.
CASES = {
    "data": Case(data=3, precision="bf16"),
    "data-fp32": Case(data=3, precision="fp32"),
    "tensor": Case(tensor=4, kv_heads=2, precision="bf16"),
    "grid": Case(tensor=2, data=2, kv_heads=1, precision="bf16"),
    "tied": Case(pipeline=2, data=2, tied=True, precision="bf16", vocab=62),
}


def targets(trainer: Trainer) -> Iterator[tuple[str, str, Tensor]]:
    """What of a rank may be flipped and must be noticed: its kind, its name and the tensor."""
    state, grid = trainer.model.state, trainer.place.grid
    if grid.data > 1 or state.own_weights:
        for name, weight in state.padded_weights.items():
            yield "weight", name, weight
    optimizer = trainer.optimizer
    for kind, tensors in (
        ("master", state.masters),
        ("first moment", optimizer.exp_avg),
        ("second moment", optimizer.exp_avg_sq),
    ):
        for shard in state.table:
            for piece in shard.own_pieces:
                if piece.copies > 1:
                    yield kind, piece.part.name, tensors[shard.name][piece.rows]
        if "tied" in trainer.groups.by_name:
            yield kind, "tok_embeddings", tensors["tok_embeddings"]


def flip(x: Tensor, element: int, bit: int) -> None:
    """Flip one bit of one element, in place."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    width = 8 * x.itemsize
    value = 1 << bit
    if bit == width - 1:
        value -= 1 << width
    flat = x.view(-1).view(integers[x.itemsize])
    flat[element] ^= value


class Flipped:
    """A rank that trains, and whose tensors are flipped one at a time."""

    def __init__(self, case: Case, rank: int, store: Store) -> None:
        self.case, self.rank = case, rank
        process = Process(rank, case.ranks, rank, case.ranks, store, LOCAL)
        self.meeting = Meeting(process)
        self.trainer = build_trainer(case.config(grad_clip=1.0), process)
        self.replicas = Replicas(self.trainer)
        first = case.share * self.trainer.place.along("data")
        self.batch = batch(problem_of(case), 0).samples(first, first + case.share)

    def step(self) -> bool:
        """A step of training; whether any rank found a difference before its update."""
        step = self.trainer.step
        result = step.run(self.batch, LR, requests=lambda: (self.replicas.compare(),))
        return result.requests[0]

    def find(self, generator: random.Random) -> tuple[str, list[Difference], int]:
        """Flip one bit of one rank, and put it back: what was flipped, what is found, and where."""
        for handle in self.trainer.model.state.arriving.values():
            handle.wait()
        victim = generator.randrange(self.case.ranks)
        pick, place, bit = generator.random(), generator.random(), generator.random()
        chosen, undo = "", None
        if victim == self.rank:
            all_targets = list(targets(self.trainer))
            kind, name, tensor = all_targets[int(pick * len(all_targets))]
            element, number = int(place * tensor.numel()), int(bit * 8 * tensor.itemsize)
            flip(tensor, element, number)
            chosen, undo = f"the {kind} {name}", (tensor, element, number)
        self.replicas.compare()
        found = self.replicas.differences
        if undo is not None:
            flip(*undo)

        def tell() -> str:
            return json.dumps([chosen, [asdict(one) for one in found]])

        def conclude(ranks: Sequence[str]) -> str:
            told = [json.loads(rank) for rank in ranks]
            found = [Difference(**fields) for _, differences in told for fields in differences]
            odd = odd_ones(found, self.trainer.place.grid.data)
            return json.dumps([told[victim][0], [asdict(one) for one in odd]])

        what, found = json.loads(self.meeting.hold(tell, conclude))
        return what, [Difference(**fields) for fields in found], victim


def campaign(case: Case, rank: int, store: Store, flips: int, clean: int, seed: int) -> list[str]:
    """Train `clean` steps and flip `flips` bits between them; what went wrong, a line each."""
    store.set_timeout(timedelta(minutes=5))
    flipped = Flipped(case, rank, store)
    generator = random.Random(seed)
    wrong = []
    for number in range(clean):
        if flipped.step():
            wrong.append(f"step {number}: {flipped.replicas.differences}")
    for number in range(flips):
        what, found, victim = flipped.find(generator)
        name = what.rpartition(" ")[2]
        # Of two that differ and have no third, either is named.
        named = any(
            name in one.tensor and (one.rank == victim or (one.either and one.other == victim))
            for one in found
        )
        if not named:
            wrong.append(f"flip {number}: {what} of rank {victim}: {found}")
    if flipped.step():
        wrong.append("a flip that was taken back is still found")
    return wrong
