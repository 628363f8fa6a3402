"""One optimizer step: a walk through the pipeline's list, the norm, the update.

Each data rank has its own samples of the global batch, each pipeline rank its own chunks of the
model. What the step reports, and whether it is applied, follows from one sum over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megallama.autograd.transfer import sent
from megallama.config.schema import Config
from megallama.data.dataset import Batch
from megallama.dist.group import Group
from megallama.model.llama import Llama
from megallama.optim.adamw import AdamW
from megallama.optim.norm import clip_factor
from megallama.parallel.pipeline import Pipeline
from megallama.parallel.zero import Zero
from megallama.spec.grid import Place
from megallama.train.early import EarlyUpdate
from megallama.train.passes import Samples, StepPasses, valid_tokens
from megallama.train.tally import Request, StepResult, Tally

#: Samples of an evaluation that are under way in a pipeline at most. Forwards wait for nothing that
#: comes back, so the first stage would run ahead of the last with everything it sends.
EVALUATED = 32


@dataclass(frozen=True)
class Pipelines:
    """This rank's pipelines: of a training step, and of an evaluation, by their micro-batches."""

    train: Callable[[int], Pipeline]
    evaluate: Callable[[int], Pipeline]


class TrainStep:
    """A step over a rank's model and its optimizer. Of `groups`, world and data are used."""

    def __init__(
        self,
        model: Llama,
        zero: Zero,
        optimizer: AdamW,
        groups: Mapping[str, Group],
        place: Place,
        pipelines: Pipelines,
        config: Config,
    ) -> None:
        self.model, self.zero, self.optimizer = model, zero, optimizer
        self.data, self.pipelines = groups["data"], pipelines
        self.tally = Tally(model, groups["world"], place, config)
        self.micro_batch, self.grad_clip = config.train.micro_batch, config.optimizer.grad_clip
        self.early = EarlyUpdate(zero, optimizer) if config.parallel.early_step else None
        #: What the number is made of that gradients, sums over tokens, are divided by.
        self.scalar: dict[str, Any] = dict(dtype=model.state.wide, device=model.state.device)

    def run(
        self,
        batch: Batch,
        lr: float,
        layer_norms: bool = False,
        requests: Callable[[], Sequence[Request]] = tuple,
    ) -> StepResult:
        """Train on this data rank's samples of a global batch.

        The weights change unless the result says otherwise. `requests` is asked once, late in the
        step; its length is the same on every rank. One that a device knows is a flag () there.
        """
        samples = Samples(self.model, batch, self.micro_batch)
        self.model.state.zero_gradients()
        self.zero.expect(len(samples))
        end = _End(self, batch, lr, requests)
        passes = StepPasses(self.model, samples, end, layer_norms)
        self.pipelines.train(len(samples)).run(passes)
        return end.result

    def evaluate(self, batch: Batch) -> Tensor:
        """The summed loss of each sample, evaluated one at a time: (n,) fp64.

        Zeros on ranks that have not the head.
        """
        count = len(batch.tokens_NS)
        return torch.cat(
            [
                self._evaluate(batch.samples(first, first + EVALUATED))
                for first in range(0, count, EVALUATED)
            ]
        )

    def _evaluate(self, batch: Batch) -> Tensor:
        passes = StepPasses(self.model, Samples(self.model, batch, 1))
        self.pipelines.evaluate(len(passes.samples)).run(passes)
        return passes.sample_losses()


class _End:
    """The end of one step: reductions, the sum over all ranks, the update."""

    def __init__(
        self, step: TrainStep, batch: Batch, lr: float, requests: Callable[[], Sequence[Request]]
    ) -> None:
        self.owner, self.batch, self.lr, self.requests = step, batch, lr, requests
        self.result: StepResult
        if step.early:  # of all data ranks, long before it is needed
            count = torch.tensor([float(valid_tokens(batch).sum())], dtype=torch.float64)
            self.valid = step.data.all_reduce(sent(count, step.model.state.device))

    def reduce(self, chunk: int) -> None:
        self.owner.zero.reduce(chunk)

    def step(self, passes: StepPasses) -> None:
        owner = self.owner
        owner.zero.finish_gradients()
        reading = owner.tally.begin(self.batch, passes, self.requests())
        early = owner.early
        if early is not None:
            # As if nothing were clipped. The host does not wait for the number; where it is 0, the
            # update is of NaN, and taken back.
            early.apply(self.lr, self.valid.wait().to(**owner.scalar))
        self.result = result = owner.tally.finish(reading, self.batch.tokens_NS.shape[1])
        factor = clip_factor(result.grad_norm, owner.grad_clip)
        kept = early is not None and result.applied and factor == 1
        if kept or (early is None and not result.applied):
            return
        with owner.zero.changing_weights():
            if early is not None:
                early.take_back()
            if result.applied:
                divisor = torch.full((), result.valid_tokens / factor, **owner.scalar)
                owner.optimizer.step(self.lr, divisor)
