"""What a step's actions do to this rank's chunks: passes over micro-batches, and what they keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from megallama.autograd.passes import Pass, WgradQueue
from megallama.autograd.stash import Stash
from megallama.autograd.transfer import sent
from megallama.data.dataset import Batch
from megallama.kernels.squared_norm import squared_norms
from megallama.model.chunk import MicroBatch
from megallama.model.llama import Llama
from megallama.spec.labels import IGNORE


@dataclass(frozen=True)
class Samples:
    """This data rank's samples of a global batch, as micro-batches of `size`."""

    model: Llama
    batch: Batch
    size: int

    def __len__(self) -> int:
        """The number of micro-batches. Raises ValueError where they do not come out even."""
        count, rest = divmod(len(self.batch.tokens_NS), self.size)
        if rest or not count:
            raise ValueError(f"{len(self.batch.tokens_NS)} samples in micro-batches of {self.size}")
        return count

    @property
    def tokens(self) -> int:
        """T: the tokens of a micro-batch."""
        return self.size * self.batch.tokens_NS.shape[1]

    def micro_batch(self, index: int) -> MicroBatch:
        """One micro-batch on the device."""
        count, length = self.batch.tokens_NS.shape
        rows = slice(index * self.size, (index + 1) * self.size)
        lengths = self.batch.document_lengths or [[length]] * count
        tokens, labels = (
            sent(torch.from_numpy(array[rows]).flatten(), self.model.state.device)
            for array in (self.batch.tokens_NS, self.batch.labels_NS)
        )
        return MicroBatch(tokens, labels, self.model.positions(lengths[rows]))


def sample_losses(loss_T: Tensor, samples: int) -> Tensor:
    """Token losses (T,) summed over each sample: (B,) fp64."""
    return loss_T.view(samples, -1).sum(1, dtype=torch.float64)


def valid_tokens(batch: Batch) -> np.ndarray:
    """The number of tokens of each sample that have a label."""
    return np.asarray((batch.labels_NS != IGNORE).sum(1))


class Held(NamedTuple):
    """A micro-batch between its forward and its backward, or between B and W."""

    batch: MicroBatch
    stash: Stash


class StepEnd(Protocol):
    """What a step does once its passes are done."""

    def reduce(self, chunk: int) -> None: ...

    def step(self, passes: StepPasses) -> None: ...


class StepPasses:
    """A step's passes over this rank's chunks: `parallel.pipeline.ChunkPasses`.

    `saved` and `kept` are what is held for a backward and for a W, by chunk and micro-batch; each
    set goes with the action that last needs it. Without an `end` nothing is saved: evaluation.
    """

    def __init__(
        self,
        model: Llama,
        samples: Samples,
        end: StepEnd | None = None,
        layer_norms: bool = False,
    ) -> None:
        self.model, self.samples, self.end = model, samples, end
        self.saved: dict[tuple[int, int], Held] = {}
        self.kept: dict[tuple[int, int], Held] = {}
        self.activation_squares: Tensor | None = None
        if layer_norms:
            self.activation_squares = self._zeros(model.config.layers)
        #: Of a micro-batch the summed loss of each sample, where the head is here.
        self.losses: dict[int, Tensor] = {}
        # Several chunks of a rank share a micro-batch while one of them holds it.
        self._batches: WeakValueDictionary[int, MicroBatch] = WeakValueDictionary()

    def sample_losses(self) -> Tensor:
        """Of every sample in order, (n,) fp64; zeros where the head is on another rank."""
        if not self.losses:
            return self._zeros(len(self.samples.batch.tokens_NS))
        return torch.cat([self.losses[index] for index in range(len(self.samples))])

    def forward(self, chunk: int, micro_batch: int, x: Tensor | None) -> Pass[Tensor | None]:
        passes, batch = self.model.chunks[chunk], self._batch(micro_batch)
        stash = Stash() if self.end is not None else None
        if stash is not None:
            self.saved[chunk, micro_batch] = Held(batch, stash)
        result = yield from passes.forward(batch, x, stash)
        if stash is not None and self.activation_squares is not None:
            for layer in passes.layers:
                self.activation_squares[layer] += squared_norms([stash.peek(layer)["x"]])[0]
        if passes.head is None:
            return result
        self.losses[micro_batch] = sample_losses(result, self.samples.size)
        return None

    def backward(
        self, chunk: int, micro_batch: int, dz: Tensor | None, queue: WgradQueue
    ) -> Pass[Tensor | None]:
        return self._backward(chunk, micro_batch, dz, queue)

    def backward_activations(
        self, chunk: int, micro_batch: int, dz: Tensor | None
    ) -> Pass[Tensor | None]:
        state = Stash()
        self.kept[chunk, micro_batch] = Held(self.saved[chunk, micro_batch].batch, state)
        return self._backward(chunk, micro_batch, dz, state)

    def backward_weights(self, chunk: int, micro_batch: int) -> Pass[None]:
        batch, state = self.kept[chunk, micro_batch]
        yield from self.model.chunks[chunk].backward_weights(batch, state)
        del self.kept[chunk, micro_batch]

    def buffer(self) -> Tensor:
        state, rows = self.model.state, self.model.tokens.shard_rows(self.samples.tokens)
        shape = rows, self.model.config.d_model
        return torch.empty(shape, dtype=state.compute, device=state.device)

    def reduce(self, chunk: int) -> None:
        if self.end is not None:
            self.end.reduce(chunk)

    def step(self) -> None:
        if self.end is not None:
            self.end.step(self)

    def _backward(
        self, chunk: int, micro_batch: int, dz: Tensor | None, wgrads: WgradQueue | Stash
    ) -> Pass[Tensor | None]:
        batch, stash = self.saved[chunk, micro_batch]
        dx = yield from self.model.chunks[chunk].backward(batch, dz, stash, wgrads)
        del self.saved[chunk, micro_batch]
        return dx

    def _batch(self, index: int) -> MicroBatch:
        found = self._batches.get(index)
        if found is None:
            found = self._batches[index] = self.samples.micro_batch(index)
        return found

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float64, device=self.model.state.device)
