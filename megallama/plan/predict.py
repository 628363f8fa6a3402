"""Seconds of a training step, predicted: no device is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megallama.config.schema import Config
from megallama.plan.hardware import Hardware
from megallama.spec.flops import flops_per_token, flops_per_token_6n
from megallama.spec.grid import make_grid
from megallama.spec.parameters import parameter_table

#: What a step's time can be spent on besides computing.
GROUPS = ("tensor", "pipeline", "bubble", "data", "step sum", "optimizer")


@dataclass(frozen=True)
class Span:
    """Something that a rank does: `lane` is "compute" or the name of the group it waits in; `start`
    and `end` are seconds from the step's begin."""

    rank: int
    lane: str
    name: str
    start: float
    end: float
    kind: str


@dataclass(frozen=True)
class Prediction:
    """A step as it is predicted.

    `exposed`: seconds of a step in which the busiest pipeline rank computes nothing, by what it
    waits for (GROUPS), and the optimizer's; with `compute_seconds` they are the step. `mfu` and
    `mfu_6n`: None where the machine has no peak.
    """

    step_seconds: float
    tokens_per_second_per_gpu: float
    mfu: float | None
    mfu_6n: float | None
    compute_seconds: float
    exposed: Mapping[str, float]


def predict(config: Config, hardware: Hardware, gpus: int) -> Prediction:
    """A step of a run on so many devices.

    Raises:
        ConfigError: the layout does not fill them.
    """
    grid = make_grid(config, gpus)
    train, model = config.train, config.model
    tokens = train.global_batch * train.sequence_length
    flops = flops_per_token(model, train.sequence_length)
    compute = tokens * flops / gpus / (0.75 * getattr(hardware.gemm.flops, train.precision))
    micro_batches = train.global_batch // (train.micro_batch * grid.data)
    bubble = compute * (grid.pipeline - 1) / micro_batches / config.parallel.chunks_per_rank
    exposed = dict.fromkeys(GROUPS, 0.0) | {"bubble": bubble}
    return _prediction(config, hardware, gpus, compute, exposed)


def spans(config: Config, hardware: Hardware, gpus: int) -> list[Span]:
    """What each pipeline rank does in a step, for a timeline; ranks are pipeline ranks."""
    seconds = predict(config, hardware, gpus).step_seconds
    return [Span(0, "compute", "step", 0.0, seconds, "compute")]


def _prediction(
    config: Config,
    hardware: Hardware,
    gpus: int,
    compute: float,
    exposed: Mapping[str, float],
) -> Prediction:
    train, peak = config.train, hardware.gemm.peak
    seconds = compute + sum(exposed.values())
    rate = train.global_batch * train.sequence_length / seconds / gpus
    parameters = sum(parameter.numel for parameter in parameter_table(config.model))
    flops = rate * flops_per_token(config.model, train.sequence_length)
    flops_6n = rate * flops_per_token_6n(parameters)
    return Prediction(
        seconds,
        rate,
        flops / peak if peak else None,
        flops_6n / peak if peak else None,
        compute,
        exposed,
    )
