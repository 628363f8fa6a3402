"""Slow ranks are named by the time that they did not wait."""

from __future__ import annotations

import time

import pytest
import torch
from torch.distributed import Store

from megallama.train.build import build_trainer
from megallama.train.meeting import Meeting
from megallama.train.process import Process
from megallama.train.stragglers import Stragglers, slow_ranks
from tests.conftest import MakeConfig
from tests.dist.processes import LOCAL, run_on


@pytest.mark.parametrize(
    "times, slow",
    [
        ([1.0, 1.0, 1.0, 1.31], [3]),
        ([1.0, 1.0, 1.0, 1.29], []),
        ([1.0, 2.0], [1]),
        ([1.0], []),
        ([3.0, 1.0, 1.0, 2.0, 1.0], [0, 3]),
    ],
)
def test_who_is_slow(times: list[float], slow: list[int]) -> None:
    assert slow_ranks(times) == slow


class Clock:
    """A watch that says what it is told."""

    waited = 0.0


def test_a_slow_rank_is_named_though_all_steps_are_equally_long(make_config: MakeConfig) -> None:
    """Rank 1 computes for 0.8 s of each second, the others for 0.2 and wait for it."""
    config = make_config({"train.micro_batch": 1, "train.global_batch": 3})

    def body(rank: int, store: Store) -> list[str]:
        process = Process(rank, 3, rank, 3, store, LOCAL)
        said: list[str] = []
        stragglers = Stragglers(build_trainer(config, process), Meeting(process), 4, said.append)
        stragglers.watch = clock = Clock()  # type: ignore[assignment]
        for step in range(1, 9):
            clock.waited += 5.0  # of a validation
            stragglers.before()
            own = 0.8 if rank == 1 else 0.2
            if rank == 2 and step == 2:
                own = 1.0  # a hiccup is no stretch
            clock.waited += 1.0 - own
            stragglers.after(step, 1.0)
        return said

    first, *others = run_on(3, body)
    assert [line.split(" (")[0] for line in first] == ["rank 1", "rank 1"]
    assert first[0].endswith("is slow: 0.8 s of its own in each of 4 steps, 4.00 times the median")
    assert others == [first, first]


def test_waiting_is_counted_where_it_is_done(make_config: MakeConfig) -> None:
    """A wait cannot be shorter than what is waited for."""
    config = make_config({"train.micro_batch": 1, "train.global_batch": 2})

    def body(rank: int, store: Store) -> float:
        trainer = build_trainer(config, Process(rank, 2, rank, 2, store, LOCAL))
        world, watch = trainer.groups["world"], trainer.groups.watch
        assert watch is not None
        world.all_reduce(torch.zeros(1)).wait()  # both are here
        before = watch.waited
        if rank == 1:
            time.sleep(0.2)
        world.all_reduce(torch.zeros(1)).wait()
        return watch.waited - before

    assert run_on(2, body)[0] > 0.1
