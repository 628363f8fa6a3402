"""The decoder layer's passes as steps: `autograd.layer`, method by method, over sizes.

To be read beside it: names are the same, and a step stands where the call stands. What is fused
there (the addition and the norm) is one kernel here. A policy's recomputations are marked `again`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from megallama.plan.driver import in_turns
from megallama.plan.ops import PAUSE, Attend, Compute, Defer, Gemm, Move, Pass, Phase, Wait
from megallama.plan.shape import Shape

#: A pass that fills a chunk; it returns whether a sum is left to whoever reads the chunk.
Fill: TypeAlias = Pass[bool]


def filled(chunks: int) -> list[Fill]:
    """Passes before a tensor that is there."""

    def nothing() -> Fill:
        yield from ()
        return False

    return [nothing() for _ in range(chunks)]


def fill_all(shape: Shape, before: Sequence[Fill]) -> Pass[None]:
    def finish(fill: Fill) -> Pass[None]:
        if (yield from fill):
            rows = shape.rows // shape.chunks
            yield Move("add", "plain", shape.stream(rows, 3))

    yield from in_turns([finish(fill) for fill in before])


def fill_and_normalise(shape: Shape, fill: Fill) -> Pass[None]:
    left = yield from fill
    yield norm_forward(shape, shape.rows // shape.chunks, 4 if left else 2)


def norm_forward(shape: Shape, rows: int, tensors: int = 2) -> Move:
    """Read x, write n; with the addition read two, write the sum too."""
    return Move("norm", "norm", shape.stream(rows, tensors))


def norm_backward(shape: Shape, tensors: int = 4) -> Move:
    """Read dn, x and the residual's gradient, write dx."""
    return Move("norm backward", "norm_backward", shape.stream(shape.rows, tensors))


class LayerPasses:
    """One layer's passes. `again`: marks the forward's steps as recomputed."""

    def __init__(self, shape: Shape, again: bool = False) -> None:
        self.shape, self.again = shape, again

    def forward(self, before: Sequence[Fill]) -> Pass[Sequence[Fill]]:
        yield from self._project_qkv(before, "n1" in self.shape.saves)
        yield from self._attend()
        residuals = self._project_out()
        return self._feed_forward((yield from residuals))

    def backward(self, joined: bool) -> Pass[None]:
        """`joined`: weight gradients are deferred; else they are another pass."""
        yield from self._restore()
        yield from self._feed_forward_backward(joined)
        yield from self._attention_backward(joined)

    def backward_weights(self) -> Pass[None]:
        shape = self.shape
        dz = yield from shape.gather()
        n2 = yield from shape.gather()
        yield dz
        yield self._wgrad("W2", shape.width, shape.ffn)
        yield n2
        dx2 = yield from shape.gather()
        yield self._wgrad("W13, first half", shape.ffn, shape.width)
        n1 = yield from shape.gather()
        yield self._wgrad("W13, second half", shape.ffn, shape.width)
        yield dx2
        yield self._wgrad("Wo", shape.width, shape.heads)
        yield n1
        yield self._wgrad("Wqkv", shape.qkv, shape.width)

    # The forward's steps. Those up to attention, a recomputing backward takes again.

    def _project_qkv(self, before: Sequence[Fill], keeps: bool) -> Pass[None]:
        shape = self.shape

        def chunk(fill: Fill) -> Pass[None]:
            yield from fill_and_normalise(shape, fill)
            if keeps:
                yield self._kept()
            yield (yield from shape.gather_chunk())
            yield self._forward("Wqkv", shape.qkv, shape.width, shape.chunks)

        yield from in_turns([chunk(fill) for fill in before])
        yield self._rotate()

    def _attend(self) -> Pass[None]:
        shape = self.shape
        yield Attend(
            "attention", "forward", shape.tokens, shape.length, shape.heads, again=self.again
        )

    def _project_out(self) -> Pass[Sequence[Fill]]:
        shape = self.shape

        def chunk(index: int) -> Fill:
            yield self._forward("Wo", shape.width, shape.heads, shape.chunks)
            if index:
                yield PAUSE
            yield (yield from shape.scatter_chunk())
            return True

        yield from ()
        return [chunk(index) for index in range(shape.chunks)]

    def _feed_forward(self, before: Sequence[Fill]) -> Sequence[Fill]:
        shape = self.shape

        def chunk(fill: Fill) -> Fill:
            yield from fill_and_normalise(shape, fill)
            if "n2" in shape.saves:
                yield self._kept()
            yield (yield from shape.gather_chunk())
            yield self._forward("W13", 2 * shape.ffn, shape.width, shape.chunks)
            yield PAUSE
            rows = shape.tokens // shape.chunks
            yield Move("SwiGLU", "activation", 3 * rows * shape.ffn * shape.itemsize)
            yield self._forward("W2", shape.width, shape.ffn, shape.chunks)
            yield (yield from shape.scatter_chunk())
            return True

        return [chunk(fill) for fill in before]

    # The backward.

    def _restore(self) -> Pass[None]:
        shape, saves = self.shape, self.shape.saves
        forward = LayerPasses(shape, again=True)
        if "qkv" not in saves:
            yield from forward._project_qkv(filled(shape.chunks), keeps=False)
        if "o" not in saves:
            yield from forward._attend()
        if "x2" not in saves:
            passes = yield from forward._project_out()
            yield from fill_all(shape, passes)

    def _feed_forward_backward(self, joined: bool) -> Pass[None]:
        shape, saves = self.shape, self.shape.saves
        dz = yield from shape.gather()
        if "n2" not in saves:
            yield norm_forward(shape, shape.rows)
        n2 = Wait()
        if joined or "gate_up" not in saves:
            n2 = yield from shape.gather()
        yield dz
        yield self._dgrad("W2", shape.ffn, shape.width)
        if "gate_up" not in saves:
            yield n2
            n2 = Wait()
            forward = LayerPasses(shape, again=True)
            for _ in range(shape.chunks):
                yield forward._forward("W13", 2 * shape.ffn, shape.width, shape.chunks)
        size = 6 * shape.tokens * shape.ffn * shape.itemsize
        yield Move("SwiGLU backward", "activation_backward", size)
        yield self._dgrad("W13", shape.width, 2 * shape.ffn)
        dn2 = yield from shape.scatter()
        if joined:
            yield Wait(n2.started)  # covered: enough has run since it was started
            yield Defer((self._wgrad("W2", shape.width, shape.ffn),))
            yield Defer((self._wgrad("W13, first half", shape.ffn, shape.width),))
            yield Defer((self._wgrad("W13, second half", shape.ffn, shape.width),))
        yield from self._scattered(dn2)
        yield norm_backward(shape)

    def _attention_backward(self, joined: bool) -> Pass[None]:
        shape = self.shape
        dx2 = yield from shape.gather()
        if "n1" not in shape.saves:
            yield norm_forward(shape, shape.rows)
        n1 = (yield from shape.gather()) if joined else Wait()
        yield dx2
        yield self._dgrad("Wo", shape.heads, shape.width)
        yield Attend("attention backward", "backward", shape.tokens, shape.length, shape.heads)
        yield self._rotate()
        yield self._dgrad("Wqkv", shape.width, shape.qkv)
        dn1 = yield from shape.scatter()
        if joined:
            yield Wait(n1.started)
            wo, wqkv = ("Wo", shape.width, shape.heads), ("Wqkv", shape.qkv, shape.width)
            yield Defer((self._wgrad(*wo), self._wgrad(*wqkv)))
        yield from self._scattered(dn1)
        yield norm_backward(shape)

    def _scattered(self, wait: Wait) -> Pass[None]:
        """Chunks' results are stacked (`parallel.tokens._Stacked`)."""
        yield wait
        if len(wait.started) > 1:
            yield Move("stack", "plain", self.shape.stream(self.shape.rows, 2))

    # One kernel each.

    def _forward(self, name: str, outputs: int, inputs: int, chunks: int) -> Gemm:
        return self._gemm(name, "forward", self.shape.tokens // chunks, outputs, inputs)

    def _dgrad(self, name: str, inputs: int, outputs: int) -> Gemm:
        return self._gemm(name, "dgrad", self.shape.tokens, inputs, outputs)

    def _wgrad(self, name: str, outputs: int, inputs: int) -> Compute:
        return self._gemm(name, "wgrad", outputs, inputs, self.shape.tokens)

    def _gemm(self, name: str, phase: Phase, m: int, n: int, k: int) -> Gemm:
        return Gemm(f"{name} {phase}", phase, m, n, k, self.shape.itemsize, self.again)

    def _rotate(self) -> Move:
        size = 2 * self.shape.tokens * self.shape.rotated * self.shape.itemsize
        return Move("RoPE", "rotate", size)

    def _kept(self) -> Move:
        """A norm's output is copied to where it is kept."""
        rows = self.shape.rows // self.shape.chunks
        return Move("keep", "plain", self.shape.stream(rows, 2))
