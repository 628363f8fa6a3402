"""Timed training steps: throughput as the LLaMA paper quotes it, tokens/s/GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from megallama.config.schema import Config
from megallama.data.dataset import Batch, Dataset
from megallama.errors import DivergedError
from megallama.optim.schedule import learning_rate
from megallama.spec.grid import Place
from megallama.train.agree import same_everywhere
from megallama.train.build import Trainer, build_trainer
from megallama.train.device import device_name
from megallama.train.doctor import versions
from megallama.train.meeting import Meeting
from megallama.train.memory import explained_shortage, refuse_too_large
from megallama.train.process import ALONE, Process
from megallama.train.throughput import speed


def bench(config: Config, steps: int, warmup: int, process: Process = ALONE) -> dict[str, Any]:
    """Time `steps` training steps after `warmup`; rates are those of the median step."""
    meeting = Meeting(process, "bench")
    dataset = same_everywhere(config, meeting)
    meeting.hold(lambda: refuse_too_large(config, process))
    with explained_shortage(config, process):
        trainer = build_trainer(config, process)
        batch_of = batches(config, dataset, trainer.place)
        try:
            seconds = [_timed_step(trainer, batch_of(i), i + 1) for i in range(warmup + steps)]
        finally:
            trainer.groups.close()
    seconds = seconds[warmup:]
    tokens = config.train.global_batch * config.train.sequence_length
    figures = speed(trainer, tokens, statistics.median(seconds))
    figures["peak_memory_bytes"] = figures.pop("memory_bytes")
    return {
        "config": config.run.name,
        "steps": steps,
        "tokens_per_step": tokens,
        "step_seconds": {
            "min": min(seconds),
            "median": statistics.median(seconds),
            "max": max(seconds),
        },
        **figures,
        "parameters": trainer.parameters,
        "layout": {
            axis: getattr(trainer.place.grid, axis) for axis in ("tensor", "pipeline", "data")
        },
        "data": "synthetic" if config.data.is_empty else "real",
        "precision": config.train.precision,
        "device": device_name(trainer.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _timed_step(trainer: Trainer, batch: Batch, step: int) -> float:
    config = trainer.config
    began = time.perf_counter()
    lr = learning_rate(config.optimizer, step, config.train.total_steps)
    result = trainer.step.run(batch, lr)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    seconds = time.perf_counter() - began
    if not result.applied:
        raise DivergedError(f"step {step} was left out ({result.fault}): its time means nothing")
    return seconds


def batches(config: Config, dataset: Dataset | None, place: Place) -> Callable[[int], Batch]:
    """This data rank's samples of a step: from the config's data, or random where it has none."""
    size, length = config.train.global_batch, config.train.sequence_length
    mine = size // place.grid.data
    first = mine * place.along("data")
    if dataset is not None:
        return lambda step: dataset.batch(step * size + first, mine)

    def synthetic(step: int) -> Batch:
        generator = np.random.default_rng((config.run.seed, step))
        tokens = generator.integers(0, config.model.vocab, (size, length + 1), dtype=np.int64)
        tokens = tokens[first : first + mine]
        return Batch(tokens[:, :-1], tokens[:, 1:], np.zeros(mine, dtype=np.int64), None)

    return synthetic
