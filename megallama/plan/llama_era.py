"""LLaMA as Megatron-LM of its time would have run it, beside the throughput that was published.

Touvron et al., arXiv 2302.13971, §2.4: 65B at about 380 tokens/s/GPU on 2048 A100-80GB, with
memory-efficient attention, the outputs of the linear layers saved and communication overlapped "as
much as possible"; no layout. Assumed here: flash attention, fused kernels as ours, tensor
parallelism of 8 inside a node with or without sequence parallelism, `plan.megatron`'s overlap,
1F1B or interleaved, messages waited for on the spot, and a distributed optimizer whose gradients
and weights travel when the passes are done.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megallama.config.load import parse_config
from megallama.config.schema import Config, Model
from megallama.plan.chunk import Part
from megallama.plan.costs import Costs, collective_seconds, message_seconds
from megallama.plan.driver import drive
from megallama.plan.hardware import Hardware
from megallama.plan.ledger import ledger
from megallama.plan.megatron import (
    HALF,
    LOSS_BACKWARD,
    LOSS_FORWARD,
    Gpt,
    add,
    column_backward,
    gather,
    gemm,
    row_backward,
    scatter,
)
from megallama.plan.ops import Attend, Collective, Move, Pass
from megallama.plan.pipeline import Key
from megallama.plan.published import OPTIMIZER_BYTES, pipeline_seconds
from megallama.plan.streams import run
from megallama.spec.grid import make_grid

#: Pipeline stages, virtual stages of each, and sequences in a micro-batch that are tried.
STAGES, VIRTUAL, MICRO_BATCHES = (1, 2, 4, 8, 16), (1, 2, 5, 10), (1, 2, 4)
TENSOR = 8


@dataclass(frozen=True)
class Era:
    """A layout that fits, and what is predicted for it."""

    pp: int
    virtual_stages: int
    dp: int
    micro_batch: int
    sequence_parallel: bool
    seconds: float
    tokens_per_second_per_gpu: float


def era_layouts(
    model: Model, sequence: int, global_batch: int, hardware: Hardware, gpus: int, count: int = 5
) -> list[Era]:
    """The `count` fastest layouts that divide and that `plan.ledger` says fit, the
    fastest first."""
    priced = [
        (_priced(config, hardware, gpus), config)
        for config in _configs(model, sequence, global_batch, gpus)
    ]
    found: list[Era] = []
    for era, config in sorted(priced, key=lambda pair: pair[0].seconds):
        if ledger(config, make_grid(config, gpus), hardware).fits:
            found.append(era)
        if len(found) == count:
            break
    return found


def _configs(model: Model, sequence: int, global_batch: int, gpus: int) -> Iterator[Config]:
    """Layouts whose layers, micro-batches and ranks divide."""
    for pp in STAGES:
        for v in VIRTUAL if pp > 1 else (1,):
            for b in MICRO_BATCHES:
                dp, rest = divmod(gpus, TENSOR * pp)
                uneven = rest or model.layers % (pp * v) or global_batch % (dp * b)
                if uneven or (v > 1 and global_batch // (dp * b) % pp):
                    continue
                for divided in (True, False):
                    yield _config(model, sequence, global_batch, (pp, v, b, divided))


def _config(
    model: Model, sequence: int, global_batch: int, layout: tuple[int, int, int, bool]
) -> Config:
    pp, v, b, divided = layout
    return parse_config(
        {
            "model": model.model_dump(),
            "train": {
                "steps": 1,
                "sequence_length": sequence,
                "global_batch": global_batch,
                "micro_batch": b,
            },
            "parallel": {
                "tensor": TENSOR,
                "pipeline": pp,
                "sequence_parallel": divided,
                "schedule": "interleaved" if v > 1 else "1f1b",
                "virtual_stages": v,
                "stage_layers": "even",
            },
            "optimizer": {"lr": 1e-4},
        }
    )


def _priced(config: Config, hardware: Hardware, gpus: int) -> Era:
    model, train, parallel = config.model, config.train, config.parallel
    pp, v = parallel.pipeline, parallel.chunks_per_rank
    dp = gpus // (TENSOR * pp)
    gpt = Gpt(
        h=model.d_model,
        a=model.heads,
        s=train.sequence_length,
        b=train.micro_batch,
        t=TENSOR,
        v=model.vocab,
        recompute="selective",
        sequence_parallel=parallel.sequence_parallel,
    )
    size = HALF * gpt.tokens * gpt.h // TENSOR
    message = message_seconds(hardware, size, 0, (pp - 1) * TENSOR * dp)
    if not gpt.sequence_parallel:
        whole = Collective("tensor", "all_gather", TENSOR, (TENSOR - 1) * size)
        message += collective_seconds(hardware, whole)
    micro_batches = train.global_batch // dp // train.micro_batch
    seconds = pipeline_seconds(
        _pass_seconds(gpt, model, pp * v, hardware), message, (pp, v), micro_batches
    )
    seconds += _end_seconds(model, pp, dp, hardware)
    rate = train.global_batch * train.sequence_length / seconds / gpus
    return Era(pp, v, dp, train.micro_batch, gpt.sequence_parallel, seconds, rate)


def _pass_seconds(gpt: Gpt, model: Model, chunks: int, hardware: Hardware) -> dict[Key, float]:
    costs, each = Costs(hardware, "bf16"), model.layers // chunks
    found: dict[Key, float] = {}
    known: dict[Part, tuple[float, float]] = {}
    for index in range(chunks):
        part = Part(each, index == 0, index == chunks - 1)
        if part not in known:
            known[part] = (
                run(drive(_forward(gpt, model.ffn, part)), costs).seconds,
                run(drive(_backward(gpt, model.ffn, part)), costs).seconds,
            )
        found["F", index, index], found["BW", index, index] = known[part]
    return found


def _end_seconds(model: Model, pp: int, dp: int, hardware: Hardware) -> float:
    """fp32 gradients scattered, Adam on a rank's share, 16-bit weights gathered."""
    layer = 4 * model.d_model**2 + 3 * model.d_model * model.ffn
    local = (model.layers // pp * layer + model.vocab * model.d_model) // TENSOR
    own = -(-local // dp)
    scattered = Collective("data", "reduce_scatter", dp, (dp - 1) * own * 4)
    gathered = Collective("data", "all_gather", dp, (dp - 1) * own * HALF)
    travel = sum(collective_seconds(hardware, c, TENSOR) for c in (scattered, gathered))
    return travel + Costs(hardware, "bf16").compute(
        Move("Adam", "optimizer", own * OPTIMIZER_BYTES)
    )


def _forward(gpt: Gpt, ffn: int, part: Part) -> Pass[None]:
    if part.embedding:
        yield Move("embedding", "embedding", 4 * HALF * gpt.tokens * gpt.h)
        yield from scatter(gpt)
    wide = gpt.h // gpt.t
    for _ in range(part.layers):
        yield Move("RMSNorm", "norm", 2 * HALF * gpt.stream)
        yield from gather(gpt)
        yield gemm("QKV", "forward", gpt.tokens, 3 * wide, gpt.h)
        yield Move("RoPE", "rotate", 4 * HALF * gpt.tokens * wide)
        yield Attend("attention", "forward", gpt.tokens, gpt.s, wide)
        yield gemm("Wo", "forward", gpt.tokens, gpt.h, wide)
        yield from scatter(gpt)
        yield add(gpt)
        yield Move("RMSNorm", "norm", 2 * HALF * gpt.stream)
        yield from gather(gpt)
        yield gemm("W13", "forward", gpt.tokens, 2 * ffn // gpt.t, gpt.h)
        yield Move("SwiGLU", "activation", 3 * HALF * gpt.tokens * ffn // gpt.t)
        yield gemm("W2", "forward", gpt.tokens, gpt.h, ffn // gpt.t)
        yield from scatter(gpt)
        yield add(gpt)
    if part.head:
        yield Move("RMSNorm", "norm", 2 * HALF * gpt.stream)
        yield from gather(gpt)
        yield gemm("logits", "forward", gpt.tokens, gpt.v // gpt.t, gpt.h)
        yield Move("loss", "loss", LOSS_FORWARD * gpt.tokens * gpt.v // gpt.t)


def _backward(gpt: Gpt, ffn: int, part: Part) -> Pass[None]:
    if part.head:
        yield Move("loss backward", "loss", LOSS_BACKWARD * gpt.tokens * gpt.v // gpt.t)
        yield from column_backward(gpt, "logits", gpt.v // gpt.t, bias=False)
        yield Move("RMSNorm backward", "norm_backward", 3 * HALF * gpt.stream)
    wide = gpt.h // gpt.t
    for _ in range(part.layers):
        yield from row_backward(gpt, "W2", ffn // gpt.t)
        yield Move("SwiGLU backward", "activation_backward", 6 * HALF * gpt.tokens * ffn // gpt.t)
        yield from column_backward(gpt, "W13", 2 * ffn // gpt.t, bias=False)
        yield Move("RMSNorm backward", "norm_backward", 4 * HALF * gpt.stream)
        yield from row_backward(gpt, "Wo", wide)
        yield Attend("attention backward", "backward", gpt.tokens, gpt.s, wide)
        yield Move("RoPE backward", "rotate", 4 * HALF * gpt.tokens * wide)
        yield from column_backward(gpt, "QKV", 3 * wide, bias=False)
        yield Move("RMSNorm backward", "norm_backward", 4 * HALF * gpt.stream)
    if part.embedding:
        yield from gather(gpt)
        yield Move("embedding backward", "embedding", (HALF + 2 * 4) * gpt.tokens * gpt.h)
