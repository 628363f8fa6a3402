"""A chunk's passes as steps: `model.chunk`, `autograd.head` and `parallel.vocab`, over sizes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from megallama.plan.driver import in_turns
from megallama.plan.layer import (
    Fill,
    LayerPasses,
    fill_all,
    fill_and_normalise,
    filled,
    norm_backward,
)
from megallama.plan.ops import Gemm, Move, Pass, Wait
from megallama.plan.shape import Shape


@dataclass(frozen=True)
class Part:
    """A chunk: its layers, and which ends of the model it has."""

    layers: int
    embedding: bool
    head: bool


class ChunkPasses:
    """The passes of a chunk over a micro-batch."""

    def __init__(self, shape: Shape, part: Part) -> None:
        self.shape, self.part = shape, part

    def forward(self) -> Pass[None]:
        shape, part = self.shape, self.part
        x: Sequence[Fill] = self._embed() if part.embedding else filled(shape.chunks)
        for _ in range(part.layers):
            x = yield from LayerPasses(shape).forward(x)
        if part.head:
            yield from self._head(x)
        else:
            yield from fill_all(shape, x)

    def backward(self, joined: bool) -> Pass[None]:
        """BW where the weight gradients are `joined`, else B."""
        shape, part = self.shape, self.part
        if part.head:
            yield norm_backward(shape, 3)
        for _ in range(part.layers):
            yield from LayerPasses(shape).backward(joined)
        if part.embedding and joined:
            yield from self._embedding_backward()

    def backward_weights(self) -> Pass[None]:
        for _ in range(self.part.layers):
            yield from LayerPasses(self.shape).backward_weights()
        if self.part.embedding:
            yield from self._embedding_backward()

    def _embed(self) -> Sequence[Fill]:
        shape = self.shape

        def chunk() -> Fill:
            yield Move("embedding", "embedding", shape.stream(shape.tokens // shape.chunks, 4))
            yield (yield from shape.scatter_chunk())
            yield Move("copy", "plain", shape.stream(shape.rows // shape.chunks, 2))
            return False

        return [chunk() for _ in range(shape.chunks)]

    def _embedding_backward(self) -> Pass[None]:
        shape = self.shape
        yield (yield from shape.gather())
        wide = max(shape.itemsize, 4)
        # dx is read and written wide, masked in place, read again; a row is read and written.
        size = shape.tokens * shape.width * (shape.itemsize + 6 * wide)
        yield Move("embedding backward", "embedding", size)

    def _head(self, x: Sequence[Fill]) -> Pass[None]:
        shape = self.shape

        def chunk(fill: Fill) -> Pass[None]:
            yield from fill_and_normalise(shape, fill)
            yield (yield from shape.gather_chunk())

        yield from in_turns([chunk(fill) for fill in x])
        if len(x) > 1:
            yield Move("stack", "plain", shape.stream(shape.tokens, 2))
        last_wgrad = yield from self._loss()
        dn = yield from shape.scatter()
        yield last_wgrad
        yield dn

    def _loss(self) -> Pass[Gemm]:
        """`autograd.cross_entropy.LinearCrossEntropy.forward_backward`; the last weight gradient is
        returned: it can hide what is done with the gradient."""
        shape, ahead = self.shape, 1 if self.shape.ranks > 1 else 0
        started: deque[tuple[int, Wait]] = deque()
        wgrads: list[Gemm] = []
        left = shape.tokens
        while left:
            tokens = min(left, shape.loss_tokens)
            left -= tokens
            yield self._gemm("logits", tokens, shape.vocab, shape.width)
            wait = Wait()
            if ahead:
                yield Move("loss statistics", "loss", self._logits(tokens))
                wait = yield from shape.gather_statistics(tokens)
            started.append((tokens, wait))
            while started and (len(started) > ahead or not left):
                wgrads.append((yield from self._finish(*started.popleft())))
                if started or left:
                    yield wgrads.pop()
        return wgrads.pop()

    def _finish(self, tokens: int, wait: Wait) -> Pass[Gemm]:
        """Turn a chunk's logits into their gradient, and give the two products of that."""
        shape = self.shape
        yield wait
        reads = 2 if shape.ranks > 1 else 3  # one rank has its statistics in the same kernel
        yield Move("loss", "loss", reads * self._logits(tokens))
        yield Gemm("logits dgrad", "dgrad", tokens, shape.width, shape.vocab, shape.itemsize)
        return Gemm("logits wgrad", "wgrad", shape.vocab, shape.width, tokens, shape.itemsize)

    def _gemm(self, name: str, m: int, n: int, k: int) -> Gemm:
        return Gemm(name, "forward", m, n, k, self.shape.itemsize)

    def _logits(self, tokens: int) -> int:
        return tokens * self.shape.vocab * self.shape.itemsize
