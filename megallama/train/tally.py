"""What a step came to: one sum over all ranks, so that every rank has the same answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megallama.autograd.transfer import sent
from megallama.config.schema import Config
from megallama.data.dataset import Batch
from megallama.dist.group import Group
from megallama.kernels.squared_norm import squared_norms
from megallama.model.llama import Llama
from megallama.spec.grid import Place
from megallama.spec.parameters import parameter_table
from megallama.train.host import Reading, begin_reading
from megallama.train.passes import StepPasses, valid_tokens

#: Something that a rank asks for in a step: known to the host, or a flag () on its device.
Request = bool | Tensor


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


class Tally:
    """Adds up a step over the ranks of `world`.

    Whatever a rank does not have (another stage's gradients, another data rank's samples) is zero
    there, so sums are exact and their order is that of the whole model and the whole batch.
    """

    def __init__(self, model: Llama, world: Group, place: Place, config: Config) -> None:
        self.model, self.world, self.place = model, world, place
        self.table = parameter_table(config.model)
        # Of what every tensor rank has alike, the first one's is counted.
        first = place.along("tensor") == 0
        self.counts_samples = first and any(c.head for c in model.chunks.values())
        self.counts_activations = first or config.parallel.sequence_parallel

    def begin(self, batch: Batch, passes: StepPasses, requests: Sequence[Request]) -> Reading:
        """Start the sum, one collective and one transfer to the host."""
        losses = passes.sample_losses()
        counts = torch.from_numpy(valid_tokens(batch))
        activations = passes.activation_squares
        if activations is None:
            activations = losses[:0]
        elif not self.counts_activations:
            activations = torch.zeros_like(activations)
        return begin_reading(
            *map(self._in_global_batch, (losses, counts, torch.from_numpy(batch.sources_N))),
            self._gradient_squares(),
            activations,
            self._asked(requests),
            over=self.world,
        )

    def finish(self, reading: Reading, length: int) -> StepResult:
        """The step's result; `length`: tokens of a sample."""
        sums, valids, sources, squares, activations, asked = reading.finish()
        valid = int(sum(valids))
        tokens = len(sums) * length
        scale = valid or math.nan  # without a label there is no mean
        loss, grad_norm = sum(sums) / scale, math.sqrt(sum(squares)) / scale
        norms = None
        if activations:
            gradient = [math.sqrt(s) / scale for s in self._by_layer(squares)]
            elements = tokens * self.model.config.d_model
            norms = LayerNorms(gradient, [math.sqrt(s / elements) for s in activations])
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

    def _asked(self, requests: Sequence[Request]) -> Tensor:
        """This rank's requests: 0 or 1 each, (n,) fp64. No flag is read back for it."""
        known = [not isinstance(one, Tensor) and one for one in requests]
        device = self.model.state.device
        asked = sent(torch.tensor(known, dtype=torch.float64), device)
        for place, one in enumerate(requests):
            if isinstance(one, Tensor):
                asked[place] = one
        return asked

    def _in_global_batch(self, x_n: Tensor) -> Tensor:
        """This data rank's samples in their places, zeros elsewhere: (n,) → (N,) fp64."""
        device, n = self.model.state.device, len(x_n)
        x_N = torch.zeros(n * self.place.grid.data, dtype=torch.float64, device=device)
        if self.counts_samples:
            first = n * self.place.along("data")
            x_N[first : first + n] = sent(x_n, device)
        return x_N

    def _gradient_squares(self) -> Tensor:
        """Σ g² over this rank's own elements of each of the model's parameters: fp64."""
        state = self.model.state
        squares = torch.zeros(len(self.table), dtype=torch.float64, device=state.device)
        index_of = {parameter.name: index for index, parameter in enumerate(self.table)}
        for shard in state.table:
            own = [p.rows for p in shard.own_pieces if p.owned]
            if own:
                gradient = state.own_gradients[shard.name]
                total = squared_norms([gradient[rows] for rows in own]).sum()
                squares[index_of[shard.name]] = total
        return squares

    def _fault(self, loss: float, squares: Sequence[float]) -> str | None:
        """Name what is not finite, or None."""
        if not math.isfinite(loss):
            return f"loss is {loss}"
        for parameter, square in zip(self.table, squares, strict=True):
            if not math.isfinite(square):
                return f"the gradient of {parameter.name} is not finite"
        return None

    def _by_layer(self, squares: Sequence[float]) -> list[float]:
        sums = [0.0] * self.model.config.layers
        for parameter, square in zip(self.table, squares, strict=True):
            if parameter.layer is not None:
                sums[parameter.layer] += square
        return sums


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
