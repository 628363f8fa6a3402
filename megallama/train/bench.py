"""Timed training steps: throughput as the LLaMA paper quotes it, tokens/s/GPU."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from megallama.config.schema import Config
from megallama.data.dataset import Batch, Dataset
from megallama.dist.compat import PrefixStore
from megallama.errors import DivergedError
from megallama.optim.schedule import learning_rate
from megallama.spec.grid import Place
from megallama.train.agree import same_everywhere
from megallama.train.build import Trainer, build_trainer
from megallama.train.device import device_name, forget_peak_memory
from megallama.train.doctor import versions
from megallama.train.meeting import Meeting
from megallama.train.memory import explained, refuse_too_large
from megallama.train.process import ALONE, Process
from megallama.train.throughput import speed


def bench(config: Config, steps: int, warmup: int, process: Process = ALONE) -> dict[str, Any]:
    """Time `steps` training steps after `warmup`; rates are those of the median step.

    `exposed_seconds`: by group, what the ranks' compute threads waited for it in a step, on average
    over steps and ranks; None on CUDA, where the device waits and not the host.
    `peak_memory_bytes`: that of the rank which needs most.
    """
    meeting = Meeting(process, "bench")
    dataset = same_everywhere(config, meeting)
    meeting.hold(lambda: refuse_too_large(config, process))
    with explained(config, process):
        trainer = build_trainer(config, process)
        forget_peak_memory(trainer.device)
        batch_of = batches(config, dataset, trainer.place)
        try:
            seconds = [_timed_step(trainer, batch_of(i), i + 1) for i in range(warmup)]
            waits = Waits(trainer)
            seconds = [
                _timed_step(trainer, batch_of(i), i + 1) for i in range(warmup, warmup + steps)
            ]
            exposed = waits.in_a_step(steps)
        finally:
            trainer.groups.close()
    tokens = config.train.global_batch * config.train.sequence_length
    figures = speed(trainer, tokens, statistics.median(seconds))
    own = json.dumps({"memory": figures.pop("memory_bytes"), "exposed": exposed})
    of_all = json.loads(meeting.hold(lambda: own, _of_all_ranks))
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
        "exposed_seconds": of_all["exposed"],
        "peak_memory_bytes": of_all["memory"],
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


def bench_layouts(
    configs: Sequence[Config], steps: int, warmup: int, process: Process = ALONE
) -> list[dict[str, Any]]:
    """`bench` of each config in turn, by the same processes. Each meets under names of its own."""
    figures = []
    for number, config in enumerate(configs):
        own = process
        if process.store is not None:
            own = replace(process, store=PrefixStore(f"layout-{number}", process.store))
        figures.append(bench(config, steps, warmup, own))
        gc.collect()  # the trainer's memory must not count as the next one's
    return figures


class Waits:
    """How long this rank's compute thread waits for each group, from now on."""

    def __init__(self, trainer: Trainer) -> None:
        self._watch = trainer.groups.watch
        self._before = dict(self._watch.waits) if self._watch else {}

    def in_a_step(self, steps: int) -> dict[str, float] | None:
        """Seconds a step by group; None on NCCL."""
        if self._watch is None:
            return None
        return {
            group: (seconds - self._before.get(group, 0.0)) / steps
            for group, seconds in self._watch.waits.items()
        }


def _of_all_ranks(texts: Sequence[str]) -> str:
    """The largest rank's memory, and the mean of the waits; one in no such group has none."""
    ranks = [json.loads(text) for text in texts]
    exposed = None
    if all(rank["exposed"] is not None for rank in ranks):
        groups = sorted({group for rank in ranks for group in rank["exposed"]})
        exposed = {
            group: sum(rank["exposed"].get(group, 0.0) for rank in ranks) / len(ranks)
            for group in groups
        }
    return json.dumps({"memory": max(rank["memory"] for rank in ranks), "exposed": exposed})


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
