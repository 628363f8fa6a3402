"""References that the hand-written passes are compared with, and what the references share.

`plain` is autograd LLaMA in plain PyTorch; `huggingface` is transformers' LLaMA. Neither imports
megallama. Shapes: B samples, S positions, D model width, H query heads, K key/value heads, E head
width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

IGNORED = -100  # a label that is no target


class ShapeLike(Protocol):
    """What a reference reads of a model's shape; `rope_scaling` may also be there."""

    @property
    def d_model(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def ffn(self) -> int: ...
    @property
    def vocab(self) -> int: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def tie_embeddings(self) -> bool: ...


@dataclass(frozen=True)
class Shape:
    """A `ShapeLike` of test size: two layers, grouped queries, no width equal to another."""

    d_model: int = 32
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 44
    vocab: int = 61
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    rope_scaling: Any = None


class Result(NamedTuple):
    """`loss` is a scalar, `logits` (B, S, V); `grads` are those of `loss`, under Meta's names."""

    loss: Tensor
    logits: Tensor
    grads: dict[str, Tensor]


class Batch(NamedTuple):
    """Tokens and their targets, both (B, S), and each sample's document lengths, if masked."""

    tokens: Tensor
    labels: Tensor
    document_lengths: Sequence[Sequence[int]] | None = None


class RopeScaling(NamedTuple):
    """Llama 3.1's four numbers."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


def rope_scaling(shape: ShapeLike) -> RopeScaling | None:
    """A shape's RoPE scaling, given as an object, as a dict, or not at all."""
    given = getattr(shape, "rope_scaling", None)
    if given is None:
        return None
    fields = RopeScaling._fields
    if isinstance(given, Mapping):
        return RopeScaling(*(given[field] for field in fields))
    return RopeScaling(*(getattr(given, field) for field in fields))


def parameter_shapes(shape: ShapeLike) -> dict[str, tuple[int, ...]]:
    """Every weight's name and shape; linear weights are (outputs, inputs)."""
    width, ffn = shape.d_model, shape.ffn
    keys = shape.kv_heads * (width // shape.heads)
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (shape.vocab, width)}
    for i in range(shape.layers):
        shapes |= {
            f"layers.{i}.attention_norm.weight": (width,),
            f"layers.{i}.attention.wq.weight": (width, width),
            f"layers.{i}.attention.wk.weight": (keys, width),
            f"layers.{i}.attention.wv.weight": (keys, width),
            f"layers.{i}.attention.wo.weight": (width, width),
            f"layers.{i}.ffn_norm.weight": (width,),
            f"layers.{i}.feed_forward.w1.weight": (ffn, width),
            f"layers.{i}.feed_forward.w3.weight": (ffn, width),
            f"layers.{i}.feed_forward.w2.weight": (width, ffn),
        }
    shapes["norm.weight"] = (width,)
    if not shape.tie_embeddings:
        shapes["output.weight"] = (shape.vocab, width)
    return shapes


def random_weights(
    shape: ShapeLike, seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Weights that make every activation and logit O(1), each drawn from (seed, name) alone.

    Norm weights are random around 1, so that a forgotten one shows. They are drawn in fp64 and
    then rounded: two dtypes of one seed are one model.
    """
    weights = {}
    for name, sizes in parameter_shapes(shape).items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        normal = torch.randn(sizes, generator=generator, dtype=torch.float64)
        if len(sizes) == 1:
            value = 1 + 0.2 * normal
        elif name == "tok_embeddings.weight" and not shape.tie_embeddings:
            value = normal
        else:
            value = normal * sizes[1] ** -0.5
        weights[name] = value.to(dtype)
    return weights


def random_batch(
    shape: ShapeLike, samples: int, length: int, seed: int = 0, ignored: float = 0.2
) -> Batch:
    """Random tokens and labels (B, S); about a share `ignored` of the labels is no target."""
    generator = torch.Generator().manual_seed(seed)
    size = (samples, length)
    tokens = torch.randint(shape.vocab, size, generator=generator)
    labels = torch.randint(shape.vocab, size, generator=generator)
    ignore = torch.rand(size, generator=generator) < ignored
    return Batch(tokens, labels.masked_fill(ignore, IGNORED))


def document_positions(
    document_lengths: Sequence[Sequence[int]], length: int
) -> tuple[Tensor, Tensor]:
    """Each position's document and its position in it, both (B, S)."""
    for lengths in document_lengths:
        if sum(lengths) != length:
            raise ValueError(f"document lengths {list(lengths)} do not add up to {length}")
    documents = [[i for i, n in enumerate(row) for _ in range(n)] for row in document_lengths]
    positions = [[p for n in row for p in range(n)] for row in document_lengths]
    return torch.tensor(documents), torch.tensor(positions)


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||, in fp64: how far `a` is from the reference `b`."""
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    a64, b64 = (x.detach().to("cpu", torch.float64) for x in (a, b))
    difference, scale = (a64 - b64).norm().item(), b64.norm().item()
    return difference / scale if scale else difference
