"""One optimizer step: micro-batches forward and backward, the norm, the update.

Each data rank has its own samples of the global batch. What the step reports, and whether it is
applied, follows from one sum over all ranks, so every rank has the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megallama.autograd.passes import WgradQueue, drive
from megallama.autograd.stash import Stash
from megallama.config.schema import Config
from megallama.data.dataset import Batch
from megallama.dist.group import Group
from megallama.model.llama import Llama, MicroBatch
from megallama.optim.adamw import AdamW
from megallama.optim.norm import clip_factor, squared_norms
from megallama.parallel.zero import Zero
from megallama.spec.grid import Place
from megallama.spec.labels import IGNORE
from megallama.train.host import read_back


@dataclass(frozen=True)
class LayerNorms:
    """Of each decoder layer: the norm of its gradients, and the RMS of its input activations."""

    gradient: list[float]
    activation: list[float]


@dataclass(frozen=True)
class StepResult:
    """What a step did. Losses are means over valid tokens, in nats; the norm is before clipping.

    `applied` is False where the step was left out: no valid token, or a non-finite value, which
    `fault` then names. `requests` says of each request that some rank made whether one did.
    """

    loss: float
    grad_norm: float
    tokens: int
    valid_tokens: int
    source_losses: dict[int, float] = field(default_factory=dict)
    layer_norms: LayerNorms | None = None
    fault: str | None = None
    requests: tuple[bool, ...] = ()

    @property
    def applied(self) -> bool:
        return self.fault is None and self.valid_tokens > 0


def micro_batches(model: Llama, batch: Batch, size: int) -> Iterator[MicroBatch]:
    """A batch's samples as the passes take them, `size` at a time."""
    device = model.state.device
    count, length = batch.tokens_NS.shape
    lengths = batch.document_lengths or [[length]] * count
    for first in range(0, count, size):
        rows = slice(first, first + size)
        tokens, labels = (
            torch.from_numpy(array[rows]).flatten().to(device)
            for array in (batch.tokens_NS, batch.labels_NS)
        )
        yield MicroBatch(tokens, labels, model.positions(lengths[rows]))


def sample_losses(loss_T: Tensor, samples: int) -> Tensor:
    """Token losses (T,) summed over each sample: (B,) fp64."""
    return loss_T.view(samples, -1).sum(1, dtype=torch.float64)


def valid_tokens(batch: Batch) -> np.ndarray:
    """The number of tokens of each sample that have a label."""
    return np.asarray((batch.labels_NS != IGNORE).sum(1))


class TrainStep:
    """A step over a rank's model and its optimizer."""

    def __init__(
        self,
        model: Llama,
        zero: Zero,
        optimizer: AdamW,
        world: Group,
        place: Place,
        config: Config,
    ) -> None:
        self.model, self.zero, self.optimizer = model, zero, optimizer
        self.world, self.place = world, place
        self.micro_batch, self.grad_clip = config.train.micro_batch, config.optimizer.grad_clip
        self.overlap = config.parallel.overlap != "none"
        # Of what every tensor rank has alike, the first one's is counted.
        self.counts = place.along("tensor") == 0
        self.counts_activations = self.counts or config.parallel.sequence_parallel

    def run(
        self,
        batch: Batch,
        lr: float,
        layer_norms: bool = False,
        requests: Callable[[], Sequence[bool]] = tuple,
    ) -> StepResult:
        """Train on this data rank's samples of a global batch.

        The weights change unless the result says otherwise. `requests` is asked once, late in the
        step; its length is the same on every rank.
        """
        self.model.state.zero_gradients()
        losses, activations = [], []
        samples, length = batch.tokens_NS.shape
        last = (samples - 1) // self.micro_batch
        for index, micro_batch in enumerate(micro_batches(self.model, batch, self.micro_batch)):
            if index == last:
                self.zero.expect_last_micro_batch()
            stash, queue = Stash(), WgradQueue(self.overlap)
            loss_T = drive(self.model.forward(micro_batch, stash))
            losses.append(sample_losses(loss_T, len(loss_T) // length))
            if layer_norms:
                activations.append(self._activation_squares(stash))
            drive(self.model.backward(micro_batch, stash, queue), queue)
        self.zero.finish_gradients()
        result = self._result(batch, torch.cat(losses), activations, requests())
        if result.applied:
            self._apply(result, lr)
        return result

    def _apply(self, result: StepResult, lr: float) -> None:
        factor = clip_factor(result.grad_norm, self.grad_clip) / result.valid_tokens
        state = self.model.state
        divisor = torch.full((), 1 / factor, dtype=state.wide, device=state.device)
        with self.zero.changing_masters():
            self.optimizer.step(lr, divisor)

    def _result(
        self,
        batch: Batch,
        losses: Tensor,
        activations: Sequence[Tensor],
        requests: Sequence[bool],
    ) -> StepResult:
        """What all ranks together did: one collective, one transfer to the host."""
        counts = torch.from_numpy(valid_tokens(batch))
        sums, valids, sources, squares, activation, asked = read_back(
            *(
                self._in_global_batch(x)
                for x in (losses, counts, torch.from_numpy(batch.sources_N))
            ),
            self._gradient_squares(),
            torch.stack(list(activations)).sum(0) if activations else losses[:0],
            torch.tensor(list(map(float, requests)), device=losses.device),
            over=self.world,
        )
        valid = int(sum(valids))
        tokens = len(sums) * batch.tokens_NS.shape[1]
        scale = valid or math.nan  # without a label there is no mean
        loss, grad_norm = sum(sums) / scale, math.sqrt(sum(squares)) / scale
        norms = None
        if activation:
            gradient = [math.sqrt(s) / scale for s in self._by_layer(squares)]
            elements = tokens * self.model.config.d_model
            norms = LayerNorms(gradient, [math.sqrt(s / elements) for s in activation])
        return StepResult(
            loss,
            grad_norm,
            tokens,
            valid,
            _by_source(sources, sums, valids),
            norms,
            self._fault(loss, squares) if valid else None,
            tuple(n > 0 for n in asked),
        )

    def _in_global_batch(self, x_n: Tensor) -> Tensor:
        """This data rank's samples in their places, zeros elsewhere: (n,) → (N,) fp64."""
        state, n = self.model.state, len(x_n)
        x_N = torch.zeros(n * self.place.grid.data, dtype=torch.float64, device=state.device)
        if self.counts:
            first = n * self.place.along("data")
            x_N[first : first + n] = x_n.to(state.device, torch.float64)
        return x_N

    def _gradient_squares(self) -> Tensor:
        """Σ g² over this rank's own elements of each parameter, (parameters,) fp64."""
        state = self.model.state
        squares = torch.zeros(len(state.table), dtype=torch.float64, device=state.device)
        for index, shard in enumerate(state.table):
            own = [p.rows for p in shard.own_pieces if p.owned]
            if own:
                gradient = state.own_gradients[shard.name]
                squares[index] = squared_norms([gradient[rows] for rows in own]).sum()
        return squares

    def _fault(self, loss: float, squares: Sequence[float]) -> str | None:
        """Name what is not finite, or None."""
        if not math.isfinite(loss):
            return f"loss is {loss}"
        table = self.model.state.table
        for shard, square in zip(table, squares, strict=True):
            if not math.isfinite(square):
                return f"the gradient of {shard.name} is not finite"
        return None

    def _by_layer(self, squares: Sequence[float]) -> list[float]:
        sums = [0.0] * len(self.model.layers)
        for shard, square in zip(self.model.state.table, squares, strict=True):
            if shard.parameter.layer is not None:
                sums[shard.parameter.layer] += square
        return sums

    def _activation_squares(self, stash: Stash) -> Tensor:
        """The sum of squares of this rank's tokens in each layer's input, (L,) fp64."""
        inputs = [stash.peek(layer)["x"] for layer in range(len(self.model.layers))]
        squares = torch.stack([x.double().square().sum() for x in inputs])
        return squares if self.counts_activations else squares.zero_()


def _by_source(
    sources: Sequence[float], losses: Sequence[float], counts: Sequence[float]
) -> dict[int, float]:
    """The mean loss of each source that has a valid token in the batch."""
    means = {}
    for source in sorted(set(sources)):
        mine = [i for i, s in enumerate(sources) if s == source]
        if valid := sum(counts[i] for i in mine):
            means[int(source)] = sum(losses[i] for i in mine) / valid
    return means
