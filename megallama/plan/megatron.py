"""Megatron-LM's GPT layers as steps, so that its published runs can be priced like our own.

Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", arXiv
2205.05198: tensor parallelism alone, or with sequence parallelism (§4.2); every layer recomputed,
or the core of attention alone (§5). MHA and GELU with 4·D, LayerNorm, dropout, 16-bit floats,
attention not fused. Communication is exposed but for what the weight gradient of a column-parallel
linear hides: the sum of its input's gradient, and with sequence parallelism the second all-gather
of its input, under the product before (§4.2.2). Names as in that paper: a heads, b micro-batch,
h hidden width, s sequence length, t tensor ranks, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megallama.plan.chunk import Part
from megallama.plan.driver import drive
from megallama.plan.ops import Collective, Gemm, Issued, Move, Pass, Phase, Start, Wait

#: Bytes of an activation.
HALF = 2
#: Bytes of a logit that the loss moves, in fp32 (vocab_parallel_cross_entropy): the copy to fp32,
#: maximum, difference, exponential, sum and division; in the backward a product and the copy back.
LOSS_FORWARD, LOSS_BACKWARD = 6 + 4 + 8 + 8 + 4 + 8, 8 + 6


@dataclass(frozen=True)
class Gpt:
    """A model and how its layers are run."""

    h: int
    a: int
    s: int
    b: int
    t: int
    v: int
    recompute: Literal["full", "selective"]
    sequence_parallel: bool

    @property
    def tokens(self) -> int:
        return self.s * self.b

    @property
    def rows(self) -> int:
        """Tokens between the linears, on one rank."""
        return self.tokens // self.t if self.sequence_parallel else self.tokens

    @property
    def stream(self) -> int:
        """Elements of the residual stream on one rank."""
        return self.rows * self.h

    @property
    def scores(self) -> int:
        """Elements of the matrix of attention scores on one rank: a·s²·b/t."""
        return self.a * self.s * self.s * self.b // self.t


def chunk_forward(gpt: Gpt, part: Part) -> list[Issued]:
    return drive(_chunk_forward(gpt, part))


def chunk_backward(gpt: Gpt, part: Part) -> list[Issued]:
    return drive(_chunk_backward(gpt, part))


def _chunk_forward(gpt: Gpt, part: Part) -> Pass[None]:
    if part.embedding:
        yield Move("embedding", "embedding", 4 * HALF * gpt.tokens * gpt.h)
        yield from scatter(gpt)
        yield Move("dropout", "plain", (2 * HALF + 1) * gpt.stream)
    for _ in range(part.layers):
        yield from layer_forward(gpt)
    if part.head:
        yield _layer_norm(gpt)
        yield from gather(gpt)
        yield gemm("logits", "forward", gpt.tokens, gpt.v // gpt.t, gpt.h)
        yield Move("loss", "loss", LOSS_FORWARD * gpt.tokens * gpt.v // gpt.t)


def _chunk_backward(gpt: Gpt, part: Part) -> Pass[None]:
    if part.head:
        yield Move("loss backward", "loss", LOSS_BACKWARD * gpt.tokens * gpt.v // gpt.t)
        yield from column_backward(gpt, "logits", gpt.v // gpt.t, bias=False)
        yield _layer_norm_backward(gpt)
    for _ in range(part.layers):
        if gpt.recompute == "full":
            yield from layer_forward(gpt)
        yield from layer_backward(gpt)
    if part.embedding:
        yield from gather(gpt)
        yield Move("embedding backward", "embedding", (HALF + 2 * 4) * gpt.tokens * gpt.h)


def layer_forward(gpt: Gpt) -> Pass[None]:
    yield _layer_norm(gpt)
    yield from gather(gpt)
    yield gemm("QKV", "forward", gpt.tokens, 3 * gpt.h // gpt.t, gpt.h)
    yield from core_attention(gpt)
    yield gemm("projection", "forward", gpt.tokens, gpt.h, gpt.h // gpt.t)
    yield from scatter(gpt)
    yield _dropout_add(gpt)
    yield _layer_norm(gpt)
    yield from gather(gpt)
    yield gemm("h to 4h", "forward", gpt.tokens, 4 * gpt.h // gpt.t, gpt.h)
    yield Move("GELU", "activation", 2 * HALF * gpt.tokens * 4 * gpt.h // gpt.t)
    yield gemm("4h to h", "forward", gpt.tokens, gpt.h, 4 * gpt.h // gpt.t)
    yield from scatter(gpt)
    yield _dropout_add(gpt)


def core_attention(gpt: Gpt) -> Pass[None]:
    """Scores, softmax, dropout, and the values' weighted sum: what selective recomputation makes
    again. The causal softmax reads half of the scores and writes all."""
    yield _scores_gemm(gpt, "scores", "forward", gpt.s, gpt.s, gpt.h // gpt.a)
    yield Move("softmax", "softmax", 3 * HALF * gpt.scores // 2)
    yield Move("dropout", "softmax", (2 * HALF + 1) * gpt.scores)
    yield _scores_gemm(gpt, "over values", "forward", gpt.s, gpt.h // gpt.a, gpt.s)
    yield Move("context", "plain", 2 * HALF * gpt.tokens * gpt.h // gpt.t)


def layer_backward(gpt: Gpt) -> Pass[None]:
    wide = 4 * gpt.h // gpt.t
    yield _dropout_backward(gpt)
    yield from row_backward(gpt, "4h to h", wide)
    yield Move("GELU backward", "activation_backward", 4 * HALF * gpt.tokens * wide)
    yield from column_backward(gpt, "h to 4h", wide)
    yield _layer_norm_backward(gpt)
    yield add(gpt)
    yield _dropout_backward(gpt)
    yield from row_backward(gpt, "projection", gpt.h // gpt.t)
    if gpt.recompute == "selective":
        yield from core_attention(gpt)
    yield from _core_attention_backward(gpt)
    yield from column_backward(gpt, "QKV", 3 * gpt.h // gpt.t)
    yield _layer_norm_backward(gpt)
    yield add(gpt)


def _core_attention_backward(gpt: Gpt) -> Pass[None]:
    width = gpt.h // gpt.a
    yield _scores_gemm(gpt, "over values dgrad", "dgrad", gpt.s, gpt.s, width)
    yield _scores_gemm(gpt, "values' gradient", "dgrad", gpt.s, width, gpt.s)
    yield Move("dropout backward", "softmax", (2 * HALF + 1) * gpt.scores)
    yield Move("softmax backward", "softmax", 4 * HALF * gpt.scores // 2)
    yield _scores_gemm(gpt, "queries' gradient", "dgrad", gpt.s, width, gpt.s)
    yield _scores_gemm(gpt, "keys' gradient", "dgrad", gpt.s, width, gpt.s)
    yield Move("gradients of QKV", "plain", 3 * 2 * HALF * gpt.tokens * gpt.h // gpt.t)


def column_backward(gpt: Gpt, name: str, columns: int, bias: bool = True) -> Pass[None]:
    """dgrad and its sum, with the weight gradient under the sum, and the bias's."""
    gathered = (yield from _start(gpt, "all_gather")) if gpt.sequence_parallel else Wait()
    yield gemm(f"{name} dgrad", "dgrad", gpt.tokens, gpt.h, columns)
    yield gathered
    operation = "reduce_scatter" if gpt.sequence_parallel else "all_reduce"
    total = yield from _start(gpt, operation)
    yield gemm(f"{name} wgrad", "wgrad", columns, gpt.h, gpt.tokens)
    if bias:
        yield Move("bias gradient", "plain", HALF * gpt.tokens * columns)
    yield total


def row_backward(gpt: Gpt, name: str, columns: int) -> Pass[None]:
    yield from gather(gpt)
    yield gemm(f"{name} dgrad", "dgrad", gpt.tokens, columns, gpt.h)
    yield gemm(f"{name} wgrad", "wgrad", gpt.h, columns, gpt.tokens)


# One kernel each.


def _layer_norm(gpt: Gpt) -> Move:
    return Move("LayerNorm", "norm", 2 * HALF * gpt.stream)


def _layer_norm_backward(gpt: Gpt) -> Move:
    return Move("LayerNorm backward", "norm_backward", 3 * HALF * gpt.stream)


def _dropout_add(gpt: Gpt) -> Move:
    """Bias, dropout and the residual in one kernel, which keeps a mask of a byte an element."""
    return Move("dropout, add", "plain", (3 * HALF + 1) * gpt.stream)


def _dropout_backward(gpt: Gpt) -> Move:
    """And the bias's gradient."""
    return Move("dropout backward", "plain", (3 * HALF + 1) * gpt.stream)


def add(gpt: Gpt) -> Move:
    """The gradients of the residual and of the branch."""
    return Move("add", "plain", 3 * HALF * gpt.stream)


def gemm(name: str, phase: Phase, m: int, n: int, k: int) -> Gemm:
    return Gemm(name, phase, m, n, k, HALF)


def _scores_gemm(gpt: Gpt, name: str, phase: Phase, m: int, n: int, k: int) -> Gemm:
    """One a head and sample."""
    return Gemm(name, phase, m, n, k, HALF, count=gpt.a * gpt.b // gpt.t)


# Collectives. g and ḡ of the paper's figure 5, f and f̄ of its figure 4.


def gather(gpt: Gpt) -> Pass[None]:
    if gpt.sequence_parallel:
        yield (yield from _start(gpt, "all_gather"))


def scatter(gpt: Gpt) -> Pass[None]:
    operation = "reduce_scatter" if gpt.sequence_parallel else "all_reduce"
    yield (yield from _start(gpt, operation))


def _start(gpt: Gpt, operation: str) -> Pass[Wait]:
    times = 2 if operation == "all_reduce" else 1
    size = times * (gpt.t - 1) * gpt.tokens * gpt.h * HALF // gpt.t
    start = Start(Collective("tensor", operation, gpt.t, size))
    yield start
    return Wait((start,))


# What a layer saves.


def saved_bytes(gpt: Gpt) -> dict[str, int]:
    """Bytes that a layer keeps on one rank from its forward to its backward, by operation (§4).

    Every operation's operands that its backward needs; masks of dropout have a byte an element.
    """
    wide = HALF * gpt.tokens * gpt.h // gpt.t
    stream = HALF * gpt.stream
    if gpt.recompute == "full":
        return {"the layer's input": stream}
    return {
        "LayerNorm's input": stream,
        "QKV's input": stream,
        "queries and keys": 2 * wide,
        "values": wide,
        "projection's input": wide,
        "mask of the projection's dropout": stream // HALF,
        "second LayerNorm's input": stream,
        "h to 4h's input": stream,
        "GELU's input": 4 * wide,
        "4h to h's input": 4 * wide,
        "mask of 4h to h's dropout": stream // HALF,
    }


def core_attention_bytes(gpt: Gpt) -> dict[str, int]:
    """What selective recomputation does not keep."""
    return {
        "softmax's output": HALF * gpt.scores,
        "mask of the scores' dropout": gpt.scores,
        "dropped-out scores": HALF * gpt.scores,
    }
