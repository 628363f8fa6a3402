"""What a case must come to: its weights, its batches, and three steps of one process in fp64.

The reference shares no code with the package: `tests.reference.plain` under autograd, and AdamW
with clipping written out here. Its initial weights are rounded to fp32, so that one reference holds
for both precisions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import islice
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from megallama.data.dataset import Batch
from tests import reference
from tests.layouts.case import LR, STEPS, Case
from tests.reference import IGNORED, Result, Shape, plain

BETAS, EPS, WEIGHT_DECAY = (0.9, 0.95), 1e-5, 0.1

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """A case without its layout: cases of one problem share one reference.

    `shares` is how many ranks the labels tell apart, where the kind of labels does.
    """

    shape: Shape
    samples: int
    sequence: int
    masked: bool
    labels: str
    shares: int
    seed: int


@dataclass(frozen=True)
class Step:
    """A step of the reference: what a report of it says, by name, the gradients of the summed loss,
    and the weights after the step. Norms are of the mean loss' gradient, before clipping."""

    numbers: dict[str, float]
    valid_tokens: int
    gradients: Named
    weights: Named


@dataclass(frozen=True)
class Reference:
    """Weights before the first step, and the steps. `grad_clip` cuts some steps and not others."""

    initial: Named
    grad_clip: float
    steps: list[Step] = field(default_factory=list)


def problem_of(case: Case) -> Problem:
    """The problem that a case lays out."""
    shape = Shape(
        d_model=case.d_model,
        layers=case.layers,
        heads=case.heads,
        kv_heads=case.kv_heads,
        ffn=case.ffn,
        vocab=case.vocab,
        tie_embeddings=case.tied,
    )
    shares = case.data if case.labels in ("unequal", "empty_rank") else 1
    return Problem(shape, case.samples, case.sequence, case.masked, case.labels, shares, case.seed)


@cache
def initial_weights(shape: Shape, seed: int) -> Named:
    """Random weights of every tensor, norms too, that fp32 holds exactly.

    What each layer adds shrinks with their number, as in GPT-2: else the gradients of 17 layers
    magnify the rounding of fp32 beyond the tolerance, in the plain reference as well.
    """
    weights = reference.random_weights(shape, seed, torch.float32)
    for name, weight in weights.items():
        if name.endswith((".wo.weight", ".w2.weight")):
            weight *= min(1.0, (2 / shape.layers) ** 0.5)
    return {name: weight.double() for name, weight in weights.items()}


def batch(problem: Problem, step: int) -> Batch:
    """The global batch of a step, 0 to 2; rank d of n takes the d-th n-th of its samples."""
    generator = np.random.default_rng([problem.seed, step])
    size = (problem.samples, problem.sequence)
    tokens = generator.integers(problem.shape.vocab, size=size)
    labels = generator.integers(problem.shape.vocab, size=size)
    keep = np.stack([_kept(generator, n, problem.sequence) for n in _kept_shares(problem, step)])
    sources = np.arange(problem.samples, dtype=np.int64) * 2 // problem.samples
    documents = None
    if problem.masked:
        documents = [_documents(generator, problem.sequence) for _ in range(problem.samples)]
    return Batch(tokens, np.where(keep, labels, IGNORED), sources, documents)


def share_of(whole: Batch, rank: int, ranks: int) -> Batch:
    """The samples of data-parallel rank `rank` of `ranks`."""
    count = len(whole.tokens_NS) // ranks
    rows = slice(rank * count, (rank + 1) * count)
    documents = whole.document_lengths
    return Batch(
        whole.tokens_NS[rows],
        whole.labels_NS[rows],
        whole.sources_N[rows],
        None if documents is None else documents[rows],
    )


def _kept(generator: np.random.Generator, share: float, length: int) -> np.ndarray:
    """Which labels of a sample are targets: a share of them, the last one first.

    A token without others before it teaches queries and keys nothing; the last has some.
    """
    order = [length - 1, *generator.permutation(length - 1)]
    keep = np.zeros(length, bool)
    keep[order[: math.ceil(share * length)]] = True
    return keep


def _kept_shares(problem: Problem, step: int) -> np.ndarray:
    """Of each sample, the share of its labels that are targets."""
    rank = np.arange(problem.samples) * problem.shares // problem.samples
    unequal = 0.15 + 0.8 * ((rank + step) % problem.shares) / max(1, problem.shares - 1)
    kinds = {
        "all": np.ones(problem.samples),
        "some": np.full(problem.samples, 0.8),
        "unequal": unequal,
        "empty_rank": np.where(rank == problem.shares - 1, 0.0, unequal),
        "empty_step": np.full(problem.samples, 0.0 if step == 1 else 0.8),
    }
    return kinds[problem.labels]


def _documents(generator: np.random.Generator, length: int) -> list[int]:
    """Up to four lengths that sum to `length`, the last above 1; borders fall anywhere."""
    choices = np.arange(1, length - 1)
    borders = generator.choice(choices, size=min(3, len(choices)), replace=False)
    return np.diff([0, *sorted(borders.tolist()), length]).tolist()


@lru_cache(maxsize=64)  # of 17 layers, one takes 15 MB
def solve(problem: Problem) -> Reference:
    """The reference's three steps."""
    initial = initial_weights(problem.shape, problem.seed)
    free = (step for step in take_steps(problem, initial, None) if step.valid_tokens)
    # The smaller of the first two is left whole, the other cut.
    grad_clip = sum(step.numbers["gradient norm"] for step in islice(free, 2)) / 2
    return Reference(initial, grad_clip, list(take_steps(problem, initial, grad_clip)))


def take_steps(problem: Problem, weights: Named, clip: float | None) -> Iterator[Step]:
    """Train from `weights`, in their dtype."""
    optimizer = _AdamW(weights)
    for number in range(STEPS):
        whole = batch(problem, number)
        result, inputs = _forward_backward(problem.shape, weights, whole)
        gradients = result.grads
        valid = int((whole.labels_NS != IGNORED).sum())
        if not valid:
            yield Step({"loss": math.nan, "gradient norm": math.nan}, 0, gradients, weights)
            continue
        mean = {name: gradient / valid for name, gradient in gradients.items()}
        numbers = {"gradient norm": _global_norm(mean.values())}
        numbers |= _losses(result.logits, whole)
        if number == STEPS - 1:
            numbers |= _layers(inputs, mean)
        factor = min(1.0, clip / (numbers["gradient norm"] + 1e-6)) if clip else 1.0
        weights = optimizer.step(weights, {name: g * factor for name, g in mean.items()})
        yield Step(numbers, valid, gradients, weights)


def _forward_backward(shape: Shape, weights: Named, whole: Batch) -> tuple[Result, list[Tensor]]:
    """The plain model's result, and the input of each of its layers."""
    tokens, labels = torch.from_numpy(whole.tokens_NS), torch.from_numpy(whole.labels_NS)
    documents: Sequence[Sequence[int]] | None = whole.document_lengths
    dtype = weights["norm.weight"].dtype
    with mock.patch.object(plain, "rms_norm", wraps=plain.rms_norm) as norm:
        result = plain.forward_backward(
            shape, weights, tokens, labels, dtype, document_lengths=documents
        )
    normed = [call.args[0].detach() for call in norm.call_args_list]
    return result, normed[:-1:2]  # a layer has two norms, its input goes into the first


def _losses(logits_NSV: Tensor, whole: Batch) -> dict[str, float]:
    """The mean loss over all valid tokens, and over those of each source that has some."""
    labels_NS = torch.from_numpy(whole.labels_NS)
    loss_NS = cross_entropy(logits_NSV.mT, labels_NS, ignore_index=IGNORED, reduction="none")
    valid_NS = labels_NS != IGNORED
    losses = {"loss": loss_NS[valid_NS].mean().item()}
    for source in (0, 1):
        mine = valid_NS & torch.from_numpy(whole.sources_N == source)[:, None]
        if mine.any():
            losses[f"loss of source {source}"] = loss_NS[mine].mean().item()
    return losses


def _layers(inputs: Sequence[Tensor], mean: Named) -> dict[str, float]:
    """The norm of each layer's gradients and the RMS of its input."""
    numbers = {}
    for layer, x in enumerate(inputs):
        parts = [g for name, g in mean.items() if name.startswith(f"layers.{layer}.")]
        numbers[f"layer {layer} gradient norm"] = _global_norm(parts)
        numbers[f"layer {layer} input RMS"] = x.double().square().mean().sqrt().item()
    return numbers


def _global_norm(tensors: Iterable[Tensor]) -> float:
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt().item()


class _AdamW:
    """Loshchilov and Hutter 2019, algorithm 2, with decay on matrices only."""

    def __init__(self, weights: Named) -> None:
        self.first = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.second = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.count = 0

    def step(self, weights: Named, gradients: Named) -> Named:
        self.count += 1
        (beta1, beta2), new = BETAS, {}
        for name, g in gradients.items():
            self.first[name] = beta1 * self.first[name] + (1 - beta1) * g
            self.second[name] = beta2 * self.second[name] + (1 - beta2) * g * g
            mean = self.first[name] / (1 - beta1**self.count)
            square = self.second[name] / (1 - beta2**self.count)
            decay = WEIGHT_DECAY * weights[name] if g.dim() == 2 else 0.0
            new[name] = weights[name] - LR * (mean / (square.sqrt() + EPS) + decay)
        return new
