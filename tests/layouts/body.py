"""What one rank of a case runs: three real training steps, and what each came to."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megallama.dist.worker import Worker
from megallama.optim.adamw import AdamW
from megallama.parallel.state import ParameterState
from megallama.train.build import Trainer, build_trainer
from megallama.train.process import Process
from megallama.train.step import StepResult
from tests.layouts.case import LR, STEPS, Case
from tests.layouts.compare import Piece, RankStep
from tests.layouts.planted import PLANTED
from tests.layouts.pool import ADDRESS, Seat
from tests.layouts.problem import Named, batch, initial_weights, problem_of, share_of

# The first call imports for two seconds: here, where the fork server does it for all workers.
torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())


def run(seat: Seat, case: Case, grad_clip: float, planted: str | None = None) -> list[RankStep]:
    """The steps of this rank, with the groups in strict mode."""
    store = seat.store if seat.size > 1 else None
    process = Process(seat.rank, seat.size, seat.rank, seat.size, store, ADDRESS)
    with ExitStack() as stack:
        stack.enter_context(nan_in_fresh_memory())
        if case.late:
            stack.enter_context(late_operations(random.Random(f"{case.seed}/{seat.rank}")))
        trainer = build_trainer(case.config(grad_clip), process, strict=True)
        stack.callback(trainer.groups.close)
        problem = problem_of(case)
        load(trainer, initial_weights(problem.shape, problem.seed))
        watch = Watch(trainer.optimizer, trainer.model.state)
        if planted is not None:
            PLANTED[planted].plant(trainer)
        rank = trainer.place.along("data")
        steps = []
        for number in range(STEPS):
            share = share_of(batch(problem, number), rank, case.data)
            result = trainer.step.run(share, LR, layer_norms=number == STEPS - 1)
            weights = pieces(trainer.model.state, trainer.model.state.masters)
            numbers, gradients = reported(result), watch.taken()
            if not result.applied:
                gradients = []  # an early step was taken, and taken back
            steps.append(RankStep(numbers, result.applied, gradients, weights))
        # What the data ranks gathered must be what its owners have.
        steps[-1] = replace(steps[-1], weights=[*steps[-1].weights, *gathered(trainer)])
        return steps


@contextmanager
def nan_in_fresh_memory() -> Iterator[None]:
    """Memory that is asked for without a value holds NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def late_operations(generator: random.Random) -> Iterator[None]:
    """Every third operation starts up to 3 ms late: what is read too early, or changed while it is
    still being sent, then differs."""
    submit = Worker.submit

    def submit_late(worker: Worker, operation: Callable[[], Any], cover: int) -> Any:
        seconds = generator.choice((0, 0, generator.random() * 3e-3))

        def late() -> Any:
            time.sleep(seconds)
            return operation()

        return submit(worker, late, cover)

    Worker.submit = submit_late  # type: ignore[method-assign]
    try:
        yield
    finally:
        Worker.submit = submit  # type: ignore[method-assign]


def reported(result: StepResult) -> dict[str, float]:
    """The numbers of a step's report, by the names that the reference has for them."""
    numbers = {"loss": result.loss, "gradient norm": result.grad_norm}
    numbers |= {f"loss of source {n}": loss for n, loss in result.source_losses.items()}
    if result.layer_norms is not None:
        pairs = zip(result.layer_norms.gradient, result.layer_norms.activation, strict=True)
        for layer, (gradient, activation) in enumerate(pairs):
            numbers[f"layer {layer} gradient norm"] = gradient
            numbers[f"layer {layer} input RMS"] = activation
    return numbers


def load(trainer: Trainer, weights: Named) -> None:
    """Put this rank's part of the given weights in place of the initial ones."""
    state = trainer.model.state
    with trainer.zero.changing_masters():
        for piece, master in state.pieces(state.masters):
            master.copy_(weights[piece.part.name][piece.region])


def pieces(state: ParameterState, tensors: Mapping[str, Tensor]) -> list[Piece]:
    """Copies of this data rank's rows of `tensors`, as rectangles of the global tensors."""
    return [
        Piece(piece.part.name, piece.start, tensor.numpy().copy())
        for piece, tensor in state.pieces(tensors)
    ]


def gathered(trainer: Trainer) -> list[Piece]:
    """Copies of the weights that the passes would use next."""
    return list(_gathered(trainer.model.state))


def _gathered(state: ParameterState) -> Iterator[Piece]:
    for shard in state.table:
        weight = state.weight(shard.name).wait()
        for piece in shard.pieces:
            yield Piece(piece.part.name, piece.start, weight[piece.rows].numpy().copy())


class Watch:
    """Copies the gradients that the optimizer is given."""

    def __init__(self, optimizer: AdamW, state: ParameterState) -> None:
        self._state = state
        self._gradients: list[Piece] = []
        self._step: Callable[[float, Tensor], None] = optimizer.step
        optimizer.step = self._watched  # type: ignore[method-assign]

    def taken(self) -> list[Piece]:
        """The gradients of the last step that was taken since the last call, if any."""
        gradients, self._gradients = self._gradients, []
        return gradients

    def _watched(self, lr: float, divisor: Tensor) -> None:
        self._gradients = pieces(self._state, self._state.own_gradients)
        self._step(lr, divisor)
