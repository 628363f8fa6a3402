"""The kernels of a training step that move memory, each as a call on operands of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megallama.autograd.embedding import embedding_backward, embedding_forward
from megallama.kernels.adamw import AdamWUpdate, adamw_
from megallama.kernels.cross_entropy import cross_entropy_
from megallama.kernels.rms_norm import add_rms_norm_forward, rms_norm_backward
from megallama.kernels.rope import rope_forward
from megallama.kernels.swiglu import swiglu_backward, swiglu_forward

EPS = 1e-5
Call = Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    """Shapes that are measured; `cache`: bytes that the machine's caches may hold."""

    tokens: int
    width: int
    ffn: int
    head_width: int
    vocab: int
    lengths: tuple[int, int]
    cache: int
    messages: tuple[int, ...]


CPU = Sizes(1024, 512, 1376, 64, 4096, (256, 1024), 2**26, (2**14, 2**16, 2**18, 2**20, 2**22))
CUDA = Sizes(8192, 4096, 11008, 128, 32000, (2048, 8192), 2**28, (2**20, 2**23, 2**26, 2**29))


class Kind(NamedTuple):
    """`make` gives a call on new operands, which moves `bytes`."""

    bytes: int
    make: Callable[[], Call]


class Kernels:
    """Calls in bf16 of these sizes on a device; what a step allocates anew, they do too."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device

    def kinds(self) -> dict[str, Kind]:
        """By the planner's names; bytes are counted as its passes count them (`plan.layer`)."""
        sizes = self.sizes
        stream, inner = sizes.tokens * sizes.width, sizes.tokens * sizes.ffn
        bf16, wide = 2, 4
        return {
            "norm": Kind(4 * bf16 * stream, self._norm),
            "norm_backward": Kind(4 * bf16 * stream, self._norm_backward),
            "rotate": Kind(4 * bf16 * stream, self._rotate),
            "activation": Kind(3 * bf16 * inner, self._activation),
            "activation_backward": Kind(6 * bf16 * inner, self._activation_backward),
            "loss": Kind(3 * bf16 * sizes.tokens * sizes.vocab, self._loss),
            "embedding": Kind((5 * bf16 + 6 * wide) * stream, self._embedding),
            "plain": Kind(2 * bf16 * stream, self._copy),
            "optimizer": Kind((8 * wide + bf16) * sizes.ffn * sizes.width, self._optimizer),
        }

    @property
    def stream(self) -> tuple[int, int]:
        return self.sizes.tokens, self.sizes.width

    @property
    def feed_forward(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.sizes.tokens, 2 * self.sizes.ffn), (self.sizes.tokens, self.sizes.ffn)

    def new(self, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
        return [torch.randn(shape, device=self.device).to(dtype) for shape in shapes]

    def _norm(self) -> Call:
        x, y, out, w = self.new(torch.bfloat16, *[self.stream] * 3, (self.sizes.width,))
        return lambda: add_rms_norm_forward(x, y, w, EPS, out=out)

    def _norm_backward(self) -> Call:
        dn, x, residual, w = self.new(torch.bfloat16, *[self.stream] * 3, (self.sizes.width,))
        dw = torch.zeros(self.sizes.width, device=self.device)
        return lambda: rms_norm_backward(dn, x, w, dw, EPS, residual=residual, out=dn)

    def _rotate(self) -> Call:
        sizes = self.sizes
        heads = 2 * sizes.width // sizes.head_width
        (x,) = self.new(torch.bfloat16, (sizes.tokens, heads, sizes.head_width))
        angles = torch.rand(sizes.tokens, 1, sizes.head_width // 2, device=self.device)
        cos, sin = angles.cos(), angles.sin()
        return lambda: rope_forward(x, cos, sin)

    def _activation(self) -> Call:
        (gate_up,) = self.new(torch.bfloat16, self.feed_forward[0])
        return lambda: swiglu_forward(gate_up)

    def _activation_backward(self) -> Call:
        gate_up, dact = self.new(torch.bfloat16, *self.feed_forward)
        return lambda: swiglu_backward(dact, gate_up, out=gate_up, act=dact)

    def _loss(self) -> Call:
        sizes = self.sizes
        (logits,) = self.new(torch.bfloat16, (sizes.tokens, sizes.vocab))
        labels = torch.randint(sizes.vocab, (sizes.tokens,), device=self.device)
        return lambda: cross_entropy_(logits, labels, sizes.vocab)

    def _embedding(self) -> Call:
        sizes = self.sizes
        w, dx = self.new(torch.bfloat16, (sizes.vocab, sizes.width), self.stream)
        dw = torch.zeros(sizes.vocab, sizes.width, device=self.device)
        tokens = torch.randint(sizes.vocab, (sizes.tokens,), device=self.device)

        def both() -> None:
            embedding_forward(tokens, w, sizes.vocab)
            embedding_backward(dx, tokens, dw, sizes.vocab)

        return both

    def _copy(self) -> Call:
        x, y = self.new(torch.bfloat16, *[self.stream] * 2)
        return lambda: x.copy_(y)

    def _optimizer(self) -> Call:
        shape = (self.sizes.ffn, self.sizes.width)
        master, gradient, first = self.new(torch.float32, *[shape] * 3)
        second, weight = torch.rand_like(master), master.bfloat16()
        divisor = torch.ones(1, device=self.device)
        update = AdamWUpdate(1e-6, (0.9, 0.95), 1e-8, 0.1, 1)

        def step() -> None:
            adamw_(update, master, gradient, (first, second), divisor, weight)
            gradient.zero_()

        return step
