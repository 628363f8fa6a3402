"""One optimizer step: micro-batches forward and backward, the norm, the update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megallama.autograd.passes import WgradQueue, drive
from megallama.autograd.stash import Stash
from megallama.data.dataset import Batch
from megallama.model.llama import Llama, MicroBatch
from megallama.optim.adamw import AdamW
from megallama.optim.norm import clip_factor, squared_norms
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
    `fault` then names.
    """

    loss: float
    grad_norm: float
    tokens: int
    valid_tokens: int
    source_losses: dict[int, float] = field(default_factory=dict)
    layer_norms: LayerNorms | None = None
    fault: str | None = None

    @property
    def applied(self) -> bool:
        return self.fault is None and self.valid_tokens > 0


def micro_batches(model: Llama, batch: Batch, size: int) -> Iterator[MicroBatch]:
    """A batch's samples as the passes take them, `size` at a time."""
    device = model.state.flat_weights.device
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
    """A step over a model and its optimizer."""

    def __init__(
        self, model: Llama, optimizer: AdamW, micro_batch: int, grad_clip: float | None
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.micro_batch, self.grad_clip = micro_batch, grad_clip

    def run(self, batch: Batch, lr: float, layer_norms: bool = False) -> StepResult:
        """Train on one global batch; the weights change unless the result says otherwise."""
        state = self.model.state
        state.zero_gradients()
        losses, activations = [], []
        for micro_batch in micro_batches(self.model, batch, self.micro_batch):
            stash, queue = Stash(), WgradQueue()
            loss_T = drive(self.model.forward(micro_batch, stash))
            losses.append(sample_losses(loss_T, len(loss_T) // batch.tokens_NS.shape[1]))
            if layer_norms:
                activations.append(self._activation_squares(stash))
            drive(self.model.backward(micro_batch, stash, queue), queue)
        state.fold_tied_gradient()
        squares = squared_norms([state.gradients[p.name] for p in state.table])
        activation = torch.stack(activations).mean(0) if activations else squares[:0]
        host = read_back(torch.cat(losses), squares, activation)
        result = self._result(batch, host[0], host[1], host[2])
        if result.applied:
            self._apply(result, lr)
        return result

    def _apply(self, result: StepResult, lr: float) -> None:
        factor = clip_factor(result.grad_norm, self.grad_clip) / result.valid_tokens
        state = self.model.state
        divisor = torch.full((), 1 / factor, dtype=state.wide, device=state.flat_masters.device)
        self.optimizer.step(lr, divisor)
        state.refresh_weights()

    def _result(
        self,
        batch: Batch,
        losses: Sequence[float],
        squares: Sequence[float],
        activation_squares: Sequence[float],
    ) -> StepResult:
        counts = valid_tokens(batch)
        valid = int(counts.sum())
        scale = valid or math.nan  # without a label there is no mean
        loss, grad_norm = sum(losses) / scale, math.sqrt(sum(squares)) / scale
        norms = None
        if activation_squares:
            gradient = [math.sqrt(s) / scale for s in self._by_layer(squares)]
            norms = LayerNorms(gradient, [math.sqrt(s) for s in activation_squares])
        return StepResult(
            loss,
            grad_norm,
            batch.tokens_NS.size,
            valid,
            _by_source(batch.sources_N, losses, counts),
            norms,
            self._fault(loss, squares) if valid else None,
        )

    def _fault(self, loss: float, squares: Sequence[float]) -> str | None:
        """Name what is not finite, or None."""
        if not math.isfinite(loss):
            return f"loss is {loss}"
        table = self.model.state.table
        for parameter, square in zip(table, squares, strict=True):
            if not math.isfinite(square):
                return f"the gradient of {parameter.name} is not finite"
        return None

    def _by_layer(self, squares: Sequence[float]) -> list[float]:
        sums = [0.0] * len(self.model.layers)
        for parameter, square in zip(self.model.state.table, squares, strict=True):
            if parameter.layer is not None:
                sums[parameter.layer] += square
        return sums

    def _activation_squares(self, stash: Stash) -> Tensor:
        """The mean square of each layer's input, (L,) fp64."""
        inputs = [stash.peek(layer)["x"] for layer in range(len(self.model.layers))]
        return torch.stack([x.double().square().mean() for x in inputs])


def _by_source(
    sources: np.ndarray, losses: Sequence[float], counts: np.ndarray
) -> dict[int, float]:
    """The mean loss of each source that has a valid token in the batch."""
    means = {}
    for source in np.unique(sources):
        mine = sources == source
        if counts[mine].sum():
            means[int(source)] = float(np.asarray(losses)[mine].sum() / counts[mine].sum())
    return means
