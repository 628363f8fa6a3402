"""Published runs of Megatron-LM, priced with a machine's constants.

Table 5 of Korthikanti et al., arXiv 2205.05198: iteration times on A100-80GB, 8 a node. Schedules
are 1F1B and interleaved 1F1B; the optimizer is Adam on fp32 masters of all local parameters; data
ranks, where there are any, add fp32 gradients when the passes are done.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megallama.plan.chunk import Part
from megallama.plan.costs import Costs, collective_seconds, message_seconds
from megallama.plan.hardware import Hardware
from megallama.plan.megatron import HALF, Gpt, chunk_backward, chunk_forward
from megallama.plan.ops import Collective, Move
from megallama.plan.pipeline import Key, few_micro_batches, period, plan_of
from megallama.plan.streams import run

#: Bytes of a parameter that a step moves besides its passes: fp32 gradients set to zero; unscaled
#: and checked; their norm; clipped; Adam's master, gradient and two moments, three written back;
#: the fp16 copy.
OPTIMIZER_BYTES = 4 + 8 + 4 + 8 + 28 + 6


@dataclass(frozen=True)
class Run:
    """A row of the table; `seconds` measured."""

    name: str
    d_model: int
    layers: int
    heads: int
    vocab: int
    seq: int
    tp: int
    pp: int
    virtual_stages: int
    dp: int
    micro_batch: int
    global_batch: int
    recompute: Literal["full", "selective"]
    sequence_parallel: bool
    seconds: float

    @property
    def gpt(self) -> Gpt:
        return Gpt(
            self.d_model,
            self.heads,
            self.seq,
            self.micro_batch,
            self.tp,
            self.vocab,
            self.recompute,
            self.sequence_parallel,
        )

    @property
    def chunks(self) -> list[Part]:
        """In model order."""
        count = self.pp * self.virtual_stages
        each = self.layers // count
        return [Part(each, i == 0, i == count - 1) for i in range(count)]


def read_runs(lines: Iterable[str]) -> list[Run]:
    """The rows of a CSV file that have a measured time of a step; lines with # are comments."""
    table = csv.DictReader(line for line in lines if not line.startswith("#"))
    rows = [row for row in table if row["seconds_per_step"]]
    return [_run(row) for row in rows]


def _run(row: Mapping[str, str]) -> Run:
    return Run(
        name=row["name"],
        d_model=int(row["d_model"]),
        layers=int(row["layers"]),
        heads=int(row["heads"]),
        vocab=int(row["vocab"]),
        seq=int(row["seq"]),
        tp=int(row["tp"]),
        pp=int(row["pp"]),
        virtual_stages=int(row["virtual_stages"]),
        dp=int(row["dp"]),
        micro_batch=int(row["micro_batch"]),
        global_batch=int(row["global_batch"]),
        recompute="full" if row["recompute"] == "full" else "selective",
        sequence_parallel=row["sequence_parallel"] == "yes",
        seconds=float(row["seconds_per_step"]),
    )


def predict_run(one: Run, hardware: Hardware) -> float:
    """Seconds of a step."""
    micro_batches = one.global_batch // one.micro_batch // one.dp
    seconds, message = _pass_seconds(one, hardware), _message_seconds(one, hardware)
    passes = pipeline_seconds(seconds, message, (one.pp, one.virtual_stages), micro_batches)
    return passes + gradient_seconds(one, hardware) + optimizer_seconds(one, hardware)


def pipeline_seconds(
    seconds: Mapping[Key, float], message: float, shape: tuple[int, int], micro_batches: int
) -> float:
    """All passes of a step; `shape`: stages, and virtual stages of each.

    Megatron-LM waits for sends and receives on the spot, both of a pass at a time.
    """
    stages, virtual_stages = shape
    name = "interleaved" if virtual_stages > 1 else "1f1b"
    few, each = few_micro_batches(name, stages, micro_batches), period(name, stages)
    beyond = (micro_batches - few) // each

    def makespan(count: int) -> float:
        plan = plan_of(name, stages, count, virtual_stages, False)
        return plan.makespan(plan.run(seconds, message, blocked=message / 2))

    first = makespan(few)
    return first + beyond * (makespan(few + each) - first) if beyond else first


def _message_seconds(one: Run, hardware: Hardware) -> float:
    """Between pipeline ranks: divided among the tensor ranks, and gathered where the stream is
    whole on each (Narayanan et al., arXiv 2104.04473, §4.1)."""
    size = HALF * one.micro_batch * one.seq * one.d_model // one.tp
    stride = one.tp * one.dp
    seconds = message_seconds(hardware, size, 0, (one.pp - 1) * stride)
    if not one.sequence_parallel:
        gather = Collective("tensor", "all_gather", one.tp, (one.tp - 1) * size)
        seconds += collective_seconds(hardware, gather)
    return seconds


def _pass_seconds(one: Run, hardware: Hardware) -> dict[Key, float]:
    costs, gpt = Costs(hardware, "bf16"), one.gpt  # 16-bit types are alike in speed
    known: dict[Part, tuple[float, float]] = {}
    found: dict[Key, float] = {}
    for index, part in enumerate(one.chunks):
        if part not in known:
            forward, backward = chunk_forward(gpt, part), chunk_backward(gpt, part)
            known[part] = run(forward, costs).seconds, run(backward, costs).seconds
        found["F", index, index], found["BW", index, index] = known[part]
    return found


def local_parameters(one: Run) -> int:
    """Of a rank of the first or the last stage, which have the most."""
    return (12 * one.d_model**2 * one.layers // one.pp + one.vocab * one.d_model) // one.tp


def gradient_seconds(one: Run, hardware: Hardware) -> float:
    """The data ranks' sum, in fp32."""
    size = 2 * (one.dp - 1) * 4 * local_parameters(one) // one.dp
    return collective_seconds(hardware, Collective("data", "all_reduce", one.dp, size), one.tp)


def optimizer_seconds(one: Run, hardware: Hardware) -> float:
    move = Move("Adam", "optimizer", OPTIMIZER_BYTES * local_parameters(one))
    return Costs(hardware, "bf16").compute(move)


@dataclass(frozen=True)
class Line:
    """A row of the comparison; `error`: predicted ÷ measured - 1."""

    run: Run
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.run.seconds - 1


def compare(runs: Sequence[Run], hardware: Hardware) -> list[Line]:
    return [Line(one, predict_run(one, hardware)) for one in runs]
