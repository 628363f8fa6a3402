"""Seconds of a training step, predicted: no device is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megallama.config.schema import Config, Model
from megallama.plan.hardware import Hardware
from megallama.plan.rundown import Rundown
from megallama.spec.flops import flops_per_token, flops_per_token_6n
from megallama.spec.grid import make_grid
from megallama.spec.parameters import parameter_table

#: What a step's time is spent on besides the busiest rank's kernels, in the order in which it is
#: said: collectives of tensor ranks that nothing hides, with the kernels that they slow down;
#: messages between pipeline ranks; waiting for other pipeline ranks; gradients and weights of data
#: ranks; the sums from the last gradient to the step's verdict; AdamW.
GROUPS = ("tensor", "pipeline", "bubble", "data", "step_sum", "optimizer")


@dataclass(frozen=True)
class Prediction:
    """A step as it is predicted.

    `compute_seconds`: kernels of the pipeline rank that has most of them, as they would take alone.
    `exposed`: seconds of the rest by GROUPS; with `compute_seconds` they are the step. `mfu` and
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
    rundown = Rundown(config, hardware, make_grid(config, gpus))
    ranks = range(rundown.grid.pipeline)
    work = max((rundown.work(rank) for rank in ranks), key=lambda timing: timing.seconds)
    passes = rundown.ends(latency=False, data=False).passes
    arrived = rundown.ends(data=False).passes if rundown.latency else passes
    gradients = rundown.ends().gradients if rundown.exchanges else arrived
    shares = {tuple(rundown.rank_parts(rank)) for rank in ranks}
    sums = max(rundown.end.sums(share) for share in shares)
    update = max(rundown.end.update(share) for share in shares)
    if config.parallel.early_step:  # the one under the other
        sums = max(0.0, sums - update)
    exposed = {
        "tensor": work.seconds - work.compute,
        "pipeline": arrived - passes,
        "bubble": passes - work.seconds,
        "data": gradients - arrived + rundown.blocked_seconds,
        "step_sum": sums,
        "optimizer": update,
    }
    return _prediction(config, hardware, gpus, work.compute, exposed)


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
    flops = rate * flops_per_token(config.model, train.sequence_length)
    flops_6n = rate * flops_per_token_6n(parameter_count(config.model))
    return Prediction(
        seconds,
        rate,
        flops / peak if peak else None,
        flops_6n / peak if peak else None,
        compute,
        exposed,
    )


def parameter_count(model: Model) -> int:
    """Of the whole model."""
    few = model.model_copy(update={"layers": 1})
    ends, layer = 0, 0
    for parameter in parameter_table(few):
        if parameter.layer is None:
            ends += parameter.numel
        else:
            layer += parameter.numel
    return ends + model.layers * layer
