"""A rank is killed or stopped in the middle of a step: every other one ends, and names it.

A step is a pipeline's of four ranks. One kind is messages only, of all forwards and then of all
backwards: receives are posted a pass before they are needed, sends are waited for at the end of the
step, and ranks 0 and 1 have a tensor group as well. The other kind is a training step.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
from torch import Tensor
from torch.distributed import Store

from megallama.dist.connect import connect
from megallama.dist.gloo import GlooGroup
from megallama.dist.handle import Handle
from megallama.errors import LostError
from megallama.train.build import build_trainer
from megallama.train.process import Process
from tests.dist.processes import LOCAL, run_on
from tests.layouts.case import LR, Case
from tests.layouts.problem import batch, problem_of

RANKS, MICRO_BATCHES = 4, 3
TIMEOUT = timedelta(seconds=3)
#: Seconds that a test may take: the timeout, 2 s in which the survivors agree, and 15 s for the
#: start of four processes and three steps, which take 1 s on two idle cores.
LIMIT = TIMEOUT.total_seconds() + 2 + 15

#: From a rank and the store to its step, which is done again and again.
Job = Callable[[int, Store], Callable[[], None]]


def messages_only(rank: int, store: Store) -> Callable[[], None]:
    """A job whose passes take no time."""
    links = [(a, a + 1) for a in range(RANKS - 1)] + [(a + 1, a) for a in range(RANKS - 1)]
    members = {f"pipeline {a}>{b}": (a, b) for a, b in links if rank in (a, b)}
    if rank in (0, 1):
        members["tensor"] = (0, 1)
    groups = connect(store, rank, members, torch.device("cpu"), timeout=TIMEOUT, hostname=LOCAL)

    def send(to: int, label: str) -> list[Handle[None]]:
        there = 0 <= to < RANKS
        return [groups[f"pipeline {rank}>{to}"].send(torch.ones(9), 1, label)] if there else []

    def receive(source: int, kind: str) -> Callable[[], None]:
        """Waits for the next micro-batch's message; the one after it is asked for before."""

        def ask(number: int) -> Handle[Tensor] | None:
            if not 0 <= source < RANKS or number == MICRO_BATCHES:
                return None
            label = f"{kind}({source}, {number})"
            return groups[f"pipeline {source}>{rank}"].receive(torch.empty(9), 0, label)

        asked, count = [ask(0)], iter(range(1, MICRO_BATCHES + 1))

        def wait() -> None:
            asked.append(ask(next(count)))
            if handle := asked.pop(0):
                handle.wait()

        return wait

    def step() -> None:
        sends: list[Handle[None]] = []
        before = receive(rank - 1, "activations of F")
        for number in range(MICRO_BATCHES):
            if "tensor" in members:
                groups["tensor"].all_reduce(torch.ones(9)).wait()
            before()
            sends += send(rank + 1, f"activations of F({rank}, {number})")
        behind = receive(rank + 1, "gradient of B")
        for number in range(MICRO_BATCHES):
            behind()
            sends += send(rank - 1, f"gradient of B({rank}, {number})")
        for handle in sends:
            handle.wait()

    return step


def training(rank: int, store: Store) -> Callable[[], None]:
    """A job that trains, by 1F1B."""
    case = Case(pipeline=RANKS, layers=RANKS, micro_batches=MICRO_BATCHES)
    config = case.config(grad_clip=1.0)
    seconds = round(TIMEOUT.total_seconds())
    parallel = config.parallel.model_copy(update={"timeout_seconds": seconds})
    process = Process(rank, RANKS, rank, RANKS, store, LOCAL)
    trainer = build_trainer(config.model_copy(update={"parallel": parallel}), process)
    whole = batch(problem_of(case), 0)

    def step() -> None:
        trainer.step.run(whole, LR)

    return step


def end_at(label: str, step: int, ending: signal.Signals, store: Store) -> None:
    """Have this process receive `ending` as it is about to send `label` in a step, from 0 on.

    What it sent before is taken by then, so that it owes this message.
    """
    send, left, sent = GlooGroup.send, iter(range(step, -1, -1)), list[Handle[None]]()

    def fatal(group: GlooGroup, x: Tensor, peer: int, this: str = "") -> Handle[None]:
        if this == label and next(left) == 0:
            for handle in sent:
                handle.wait()
            store.set("victim", str(os.getpid()))
            os.kill(os.getpid(), ending)
        sent.append(send(group, x, peer, this))
        return sent[-1]

    GlooGroup.send = fatal


def survivors(job: Job, victim: int, label: str, ending: signal.Signals) -> list[LostError]:
    """What the others raise when `victim` ends before it sends `label` in the third step."""

    def body(rank: int, store: Store) -> LostError | None:
        _meet(store, RANKS, "start")  # the timeout is no slow start's
        step = job(rank, store)
        if rank == victim:
            end_at(label, 2, ending, store)
        try:
            while True:
                step()
        except LostError as error:
            _meet(store, RANKS - 1, "end")  # nobody learns of anything from a survivor's end
            if rank == (victim + 1) % RANKS:
                os.kill(int(store.get("victim")), signal.SIGKILL)
            return error

    errors = run_on(RANKS, body, LIMIT, dies=[victim])
    return [error for rank, error in enumerate(errors) if rank != victim]


def _meet(store: Store, size: int, place: str) -> None:
    store.add(place, 1)
    while store.add(place, 0) < size:
        time.sleep(0.01)


@pytest.mark.parametrize(
    "job, ending, victim, label, owed",
    [
        (messages_only, signal.SIGKILL, 3, "gradient of B(3, 0)", {"send gradient of B(3, 0)"}),
        (
            messages_only,
            signal.SIGKILL,
            1,
            "activations of F(1, 2)",
            {"send activations of F(1, 2)", "send gradient of B(1, 0)"},
        ),
        (
            messages_only,
            signal.SIGSTOP,
            0,
            "activations of F(0, 1)",
            {"send activations of F(0, 1)"},
        ),
        (
            messages_only,
            signal.SIGSTOP,
            2,
            "gradient of B(2, 0)",
            {"send gradient of B(2, 0)", "take gradient of B(3, 1)", "take gradient of B(3, 2)"},
        ),
        (
            training,
            signal.SIGKILL,
            1,
            "activations of F(1, 2)",
            {"send activations of F(1, 2)", "send gradient of B(1, 0)"},
        ),
        (
            training,
            signal.SIGSTOP,
            2,
            "gradient of B(2, 0)",
            {"send gradient of B(2, 0)", "send activations of F(2, 2)"},
        ),
    ],
)
def test_every_survivor_names_the_rank_and_what_it_owed(job, ending, victim, label, owed):
    """`owed`: to each of its neighbours; which of them is heard first is chance.

    Rank 2 has a receive for B(3, 1) posted when it is stopped: its system may yet take the message.
    """
    errors = survivors(job, victim, label, ending)
    verdicts = set()
    assert len(errors) == RANKS - 1
    for error in errors:
        assert error.peer == victim
        assert error.owed.removeprefix("to ") in owed
        assert error.shared
        assert error.owed in str(error)
        verdicts.add(str(error))
    assert len(verdicts) == 1
    pattern = (
        rf"rank {victim} is lost \(host [^)]+\): rank \d waited for it to .* \(group "
        r"'pipeline \d>\d', which completed \d+ operations, the last '(send|take) .*'; last step 0\)"
        r"; try again"
    )
    assert re.fullmatch(pattern, verdicts.pop())
