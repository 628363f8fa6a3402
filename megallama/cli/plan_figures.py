"""A plan as figures: what `megallama plan` prints, and what --json writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megallama.config.schema import Config
from megallama.errors import ConfigError
from megallama.plan.advice import LAWS, SERVING, TRAINING, Advice, Law, for_flops, for_loss
from megallama.plan.hardware import Hardware
from megallama.plan.ledger import Ledger, Stage, ledger, way_out
from megallama.plan.predict import Prediction, parameter_count, predict
from megallama.plan.search import Found
from megallama.spec.grid import Grid, make_grid

GIB = 1 << 30
#: The share of the network's bandwidth that a plan is predicted with, too: machines are described
#: without congestion, and nothing that this code could ask knows how much there will be.
CONGESTED = 0.5


@dataclass(frozen=True)
class Planned:
    """One layout on one machine. `change`: where it does not fit, the cheapest change that would,
    empty where none does. `congested`: the step with a share of the network (`CONGESTED`), None
    inside a node. `tokens`: of the whole training."""

    config: Config
    hardware: Hardware
    grid: Grid
    memory: Ledger
    change: str
    prediction: Prediction
    congested: Prediction | None
    tokens: float

    @property
    def gpu_hours(self) -> float:
        return self.tokens / self.prediction.tokens_per_second_per_gpu / 3600

    @property
    def days(self) -> float:
        return self.gpu_hours / self.grid.size / 24


@dataclass(frozen=True)
class Advised:
    """What a scaling law says: (words, model) of this run, and of the models that it advises.

    `flops_per_gpu_hour`: of this run's step as predicted, at 6 a parameter and token.
    """

    law: Law
    served: float
    rows: tuple[tuple[str, Advice], ...]
    flops_per_gpu_hour: float

    def gpu_hours(self, model: Advice) -> float:
        """Of its training."""
        return model.training_flops / self.flops_per_gpu_hour

    def flops(self, model: Advice) -> float:
        """Of its training and of serving the tokens, also where the advice was without them."""
        return model.training_flops + SERVING * model.parameters * self.served


def planned(config: Config, hardware: Hardware, gpus: int, budget: float | None) -> Planned:
    """Raises ConfigError where the GPUs do not make the config's grid."""
    try:
        grid = make_grid(config, gpus)
    except ConfigError as error:
        raise ConfigError(f"--gpus {gpus}: {error}") from None
    parallel = {"data": grid.data, "virtual_stages": config.parallel.chunks_per_rank}
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})
    train = config.train
    run = train.total_steps * train.global_batch * train.sequence_length
    memory = ledger(config, grid, hardware)
    change = "" if memory.fits else _change(config, grid, hardware)
    prediction = predict(config, hardware, gpus)
    congested = None
    if gpus > hardware.ranks:
        congested = predict(config, hardware.with_network(CONGESTED), gpus)
    return Planned(config, hardware, grid, memory, change, prediction, congested, budget or run)


def _change(config: Config, grid: Grid, hardware: Hardware) -> str:
    found = way_out(config, grid, hardware)
    if found is None:
        return ""
    change, held = found
    more = f", on {change.grid.size} GPUs" if change.grid.size > grid.size else ""
    return f"with {change.text} its tensors would take {held / GIB:,.1f} GiB{more}"


def advise(
    plan: Planned, goal: Mapping[str, float | None], served: float, law: str
) -> Advised | None:
    """By a loss, or by GPU-hours at this plan's speed; None where neither is given."""
    parameters = parameter_count(plan.config.model)
    rate = plan.prediction.tokens_per_second_per_gpu * 3600
    an_hour, chosen = TRAINING * parameters * rate, LAWS[law]
    own = Advice(
        parameters, plan.tokens, chosen.loss(parameters, plan.tokens),
        TRAINING * parameters * plan.tokens, SERVING * parameters * served,
    )  # fmt: skip
    rows = [("this run", own)]
    for tokens in sorted({0.0, served}):
        more = f", {amount(tokens)} served" if tokens else ""
        if goal["loss"]:
            rows.append((f"cheapest{more}", for_loss(chosen, goal["loss"], tokens)))
        elif goal["gpu_hours"]:
            flops = goal["gpu_hours"] * an_hour
            rows.append((f"least loss{more}", for_flops(chosen, flops, tokens)))
    return Advised(chosen, served, tuple(rows), an_hour) if len(rows) > 1 else None


def amount(number: float) -> str:
    """`1.4T`, `65.3B`."""
    for unit, word in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= unit * 0.9995:
            return (
                f"{number / unit:.3g}{word}"
                if number < 1e3 * unit
                else f"{number / unit:,.0f}{word}"
            )
    return f"{number:,.0f}"


def figures(plan: Planned, found: Found | None, advice: Advised | None) -> dict[str, Any]:
    """What --json writes. Every figure of time is predicted."""
    best = _layout(plan.config, plan.memory.largest, plan.prediction)
    candidates = [best]
    if found:
        front = set(map(id, found.front))
        candidates = [
            _layout(one.layout.config, one.stage, one.prediction) | {"on_front": id(one) in front}
            for one in found.ranked
        ]
    return {
        "predicted": True,
        "gpu": plan.hardware.name,
        "gpus": plan.grid.size,
        "fits": plan.memory.fits,
        "capacity_bytes": plan.memory.capacity,
        "change_that_fits": plan.change or None,
        "best": best,
        "candidates": candidates,
        "layouts_tried": found.tried if found else 1,
        "layouts_predicted": found.priced if found else 1,
        "stages": [_stage(one) for one in plan.memory.stages],
        "congested": _congested(plan.congested),
        "budget": {"tokens": plan.tokens, "days": plan.days, "gpu_hours": plan.gpu_hours},
        "advice": _advice(advice) if advice else None,
    }


def _layout(config: Config, stage: Stage, prediction: Prediction) -> dict[str, Any]:
    """The keys of `train` are there as `train.KEY` too, as they are written on a command line."""
    train = {
        "micro_batch": config.train.micro_batch,
        "saved_activations": config.train.saved_activations,
    }
    return {
        "parallel": config.parallel.model_dump(mode="json"),
        "train": train,
        **{f"train.{key}": value for key, value in train.items()},
        "memory_bytes": stage.held,
        "allocator_slack_bytes": stage.slack,
        "libraries_bytes": stage.libraries,
        "step_seconds": prediction.step_seconds,
        "tokens_per_second_per_gpu": prediction.tokens_per_second_per_gpu,
        "mfu": prediction.mfu,
        "mfu_6n": prediction.mfu_6n,
        "compute_seconds": prediction.compute_seconds,
        "exposed": dict(prediction.exposed),
    }


def _congested(step: Prediction | None) -> dict[str, float] | None:
    if step is None:
        return None
    return {
        "network_share": CONGESTED,
        "step_seconds": step.step_seconds,
        "tokens_per_second_per_gpu": step.tokens_per_second_per_gpu,
    }


def _stage(stage: Stage) -> dict[str, Any]:
    return {
        "rank": stage.rank,
        "layers": [[*chunk.layers] for chunk in stage.chunks],
        "items": dict(stage.items),
        "memory_bytes": stage.held,
        "allocator_slack_bytes": stage.slack,
        "libraries_bytes": stage.libraries,
    }


def _advice(advice: Advised) -> dict[str, Any]:
    law = advice.law
    return {
        "law": {"source": law.source, "E": law.e, "A": law.a, "alpha": law.alpha, "B": law.b,
                "beta": law.beta},
        "served_tokens": advice.served,
        "models": [
            {
                "of": words,
                "parameters": model.parameters,
                "tokens": model.tokens,
                "loss": model.loss,
                "training_flops": model.training_flops,
                "serving_flops": advice.flops(model) - model.training_flops,
                "training_gpu_hours": advice.gpu_hours(model),
            }
            for words, model in advice.rows
        ],
    }  # fmt: skip
