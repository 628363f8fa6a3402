"""Saves of several ranks: one rank's disk fails, its file is damaged, or it dies while it writes."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from torch.distributed import Store

from megallama.checkpoint.store import Checkpoint, checkpoint_path, committed_checkpoints
from megallama.config.schema import Config
from megallama.errors import ConfigError, LostError, UserError
from megallama.files import Disk
from megallama.train.build import build_dataset, build_trainer
from megallama.train.init_from import take_weights
from megallama.train.job import train
from megallama.train.meeting import Meeting
from megallama.train.metrics import read_metrics
from megallama.train.process import Process
from tests.conftest import MakeConfig, losses
from tests.dist.processes import LOCAL, run_on
from tests.poison import poison

RANKS = 4
#: With two tensor and two data ranks every rank's file has rows that one other rank at most reads.
LAYOUT = {"parallel.tensor": 2, "train.precision": "fp64", "checkpoint.every": 2}


class Ended(NamedTuple):
    """How a rank ended, and what it printed."""

    code: int
    error: str
    output: str


def run(config: Config, fault: Callable[[int], Any] = lambda rank: None, **named: Any) -> list[Any]:
    """Train on four ranks; `fault` is called in each first."""

    def body(rank: int, store: Store) -> Ended:
        fault(rank)
        output = io.StringIO()
        with redirect_stdout(output):
            try:
                process = Process(rank, RANKS, rank, RANKS, store, LOCAL)
                return Ended(train(config, process=process), "", output.getvalue())
            except UserError as error:
                return Ended(error.exit_code, str(error), output.getvalue())

    return run_on(RANKS, body, time_limit=60.0, **named)


def folder_of(config: Config) -> Path:
    return config.run.directory / "checkpoints"


def steps_saved(config: Config) -> list[int]:
    """The finished checkpoints, all read wholly; nothing else lies beside them."""
    paths = committed_checkpoints(folder_of(config))
    for path in paths:
        Checkpoint(path).verify()
    return [int(path.name[5:]) for path in paths]


def contents(config: Config, step: int) -> dict[str, bytes]:
    directory = checkpoint_path(folder_of(config), step)
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test leaves its run that nothing happened to, for the others."""
    return tmp_path_factory.mktemp("original") / "run"


@pytest.fixture
def straight(make_config: MakeConfig, original: Path) -> Config:
    """A run that nothing happens to."""
    config = make_config({**LAYOUT, "run.name": "straight"})
    if not original.exists():
        assert [end.code for end in run(config)] == [0] * RANKS
        shutil.copytree(config.run.directory, original)
    elif not config.run.directory.exists():
        shutil.copytree(original, config.run.directory)
    assert steps_saved(config) == [2, 4, 6]
    return config


def refuse_sync(who: int, step: int, do: Callable[[], None]) -> Callable[[int], None]:
    """Where rank `who` syncs its file of `step`."""

    def arrange(rank: int) -> None:
        real, create = Disk.sync, Disk.create
        mine: set[int] = set()

        def created(disk: Disk, path: Path) -> int:
            descriptor = create(disk, path)
            if path.name.endswith(".safetensors") and path.parent.name == f"step-{step:08d}":
                mine.add(descriptor)
            return descriptor

        def sync(disk: Disk, descriptor: int) -> None:
            if descriptor in mine:
                mine.remove(descriptor)  # its number is given again
                do()
            real(disk, descriptor)

        if rank == who:
            Disk.create, Disk.sync = created, sync  # type: ignore[method-assign]

    return arrange


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_one_rank_s_full_disk_costs_one_checkpoint(
    make_config: MakeConfig, straight: Config
) -> None:
    config = make_config(LAYOUT)
    ends = run(config, refuse_sync(3, 4, full))
    assert [end.code for end in ends] == [0] * RANKS
    (line,) = [x for x in ends[0].output.splitlines() if "no checkpoint" in x]
    assert re.match(r"no checkpoint of step 4: .*rank-00003\.safetensors: No space left", line)
    assert all("no checkpoint" not in end.output for end in ends[1:])
    assert steps_saved(config) == [2, 6]
    assert not checkpoint_path(folder_of(config), 4).exists()
    assert contents(config, 6) == contents(straight, 6)


def test_the_last_save_that_fails_on_one_rank_ends_all_alike(make_config: MakeConfig) -> None:
    config = make_config(LAYOUT)
    ends = run(config, refuse_sync(1, 6, full))
    assert {(end.code, end.error) for end in ends} == {(ConfigError.exit_code, ends[0].error)}
    assert re.match(r"cannot write .*step-00000006/rank-00001\.safetensors", ends[0].error)
    assert steps_saved(config) == [2, 4]
    assert [end.code for end in run(config)] == [0] * RANKS
    assert steps_saved(config)[-1] == 6


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 16
    path.write_bytes(raw)


@pytest.mark.parametrize("damaged", [1, 3, "manifest"])
def test_damage_that_one_rank_finds_takes_all_to_the_checkpoint_before(
    make_config: MakeConfig, straight: Config, damaged: Any
) -> None:
    """Bit for bit the run that was not damaged, and the file is named."""
    whole, rows = contents(straight, 6), losses(straight.run.directory)
    name = "manifest.json" if damaged == "manifest" else f"rank-{damaged:05d}.safetensors"
    flip(checkpoint_path(folder_of(straight), 6) / name)
    ends = run(straight)
    assert [end.code for end in ends] == [0] * RANKS
    (line,) = [x for x in ends[0].output.splitlines() if "passed over" in x]
    assert f"step-00000006/{name}: " in line
    assert f"resumed from {checkpoint_path(folder_of(straight), 4)}\n" in ends[0].output
    assert contents(straight, 6) == whole
    # Step 4 was validated before the checkpoint: its row stays.
    assert losses(straight.run.directory) == rows


def test_all_damaged_is_an_error_of_all(straight: Config) -> None:
    for rank, step in enumerate((2, 4, 6)):
        flip(checkpoint_path(folder_of(straight), step) / f"rank-{rank:05d}.safetensors")
    ends = run(straight)
    assert {(end.code, end.error) for end in ends} == {(65, ends[0].error)}
    assert "none of its 3 checkpoints is intact" in ends[0].error


def test_a_checkpoint_of_another_layout_is_verified_by_who_reads_it(
    make_config: MakeConfig, straight: Config
) -> None:
    """A pipeline of two replicas opens the files of tensor ranks; damage is found all the same."""
    flip(checkpoint_path(folder_of(straight), 6) / "rank-00002.safetensors")
    layout = {**LAYOUT, "parallel.tensor": 1, "parallel.pipeline": 2, "run.name": "straight"}
    ends = run(make_config(layout))
    assert [end.code for end in ends] == [0] * RANKS
    assert "passed over a damaged checkpoint" in ends[0].output
    assert steps_saved(straight) == [2, 4, 6]


@pytest.mark.parametrize("who", [0, 2])
def test_a_rank_that_dies_while_it_writes_leaves_the_checkpoint_before(
    make_config: MakeConfig, straight: Config, who: int
) -> None:
    config = make_config(LAYOUT)
    ends = run(
        config, refuse_sync(who, 4, lambda: os.kill(os.getpid(), signal.SIGKILL)), dies={who}
    )
    assert ends[who] is None
    for end in (end for rank, end in enumerate(ends) if rank != who):
        assert end.code == LostError.exit_code
    assert steps_saved(config) == [2]
    assert [end.code for end in run(config)] == [0] * RANKS
    assert contents(config, 6) == contents(straight, 6)
    assert losses(config.run.directory) == losses(straight.run.directory)


def test_a_run_begins_from_weights_of_another_layout(
    make_config: MakeConfig, straight: Config
) -> None:
    """Of two tensor and two data ranks, in a pipeline of two replicas: bit for bit."""
    source = checkpoint_path(folder_of(straight), 6)
    changes = {**LAYOUT, "parallel.tensor": 1, "parallel.pipeline": 2, "train.steps": 2}
    begun = {**changes, "run.init_from": str(source)}

    def body(rank: int, store: Store) -> list[str]:
        process = Process(rank, RANKS, rank, RANKS, store, LOCAL)
        config = make_config({**begun, "run.name": "begun"})
        trainer, checkpoint = build_trainer(config, process), Checkpoint(source)
        take_weights(trainer, build_dataset(config), Meeting(process), lambda text: None)
        wrong = [
            piece.part.name
            for piece, tensor in trainer.model.state.pieces(trainer.model.state.masters)
            if not checkpoint.read(f"master/{piece.part.name}", piece.region).equal(tensor)
        ]
        moments = (trainer.optimizer.exp_avg, trainer.optimizer.exp_avg_sq)
        wrong += [name for kind in moments for name, tensor in kind.items() if tensor.any()]
        return [*wrong, *([] if trainer.optimizer.updates == 0 else ["updates"])]

    assert run_on(RANKS, body, time_limit=60.0) == [[]] * RANKS
    there = make_config({**begun, "run.name": "there"})
    assert [end.code for end in run(there)] == [0] * RANKS
    here = make_config({**begun, "parallel.pipeline": 1, "run.name": "here"})
    with redirect_stdout(io.StringIO()):
        assert train(here) == 0
    found, wanted = (
        [row["loss"] for row in read_metrics(c.run.directory / "metrics.jsonl") if "loss" in row]
        for c in (there, here)
    )
    assert found == pytest.approx(wanted, rel=1e-12)


SPIKE = {
    "train.steps": 10,
    "optimizer.schedule": "constant",
    "validation.every": 0,
    "checkpoint.keep": 4,
    "parallel.timeout_seconds": 3,
    "train.spike": {"factor": 1.03, "window": 3, "rewind": 3},
}


def test_a_spike_sends_all_ranks_back_also_where_one_dies_on_the_way(
    make_config: MakeConfig,
) -> None:
    """At step 9 to step 6. The decisions are one process's, and the killed run's bits the same."""

    def poisoned(rank: int) -> None:
        poison(range(32, 36))

    def killed(rank: int) -> None:
        poisoned(rank)
        real = Checkpoint.fill

        def fatal(*arguments: Any, **named: Any) -> None:
            real(*arguments, **named)
            if rank == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        Checkpoint.fill = fatal  # type: ignore[method-assign]

    def decided(config: Config) -> list[dict[str, Any]]:
        states = [Checkpoint(checkpoint_path(folder_of(config), s)) for s in steps_saved(config)]
        keys = ("step", "samples", "skips", "rewinds")
        return [{key: one.manifest.state[key] for key in keys} for one in states]

    straight, broken = (make_config({**LAYOUT, **SPIKE, "run.name": n}) for n in ("a", "b"))
    one = make_config({**LAYOUT, **SPIKE, "parallel.tensor": 1, "run.name": "one"})
    assert [end.code for end in run(straight, poisoned)] == [0] * RANKS
    assert decided(straight)[-1] == {"step": 10, "samples": 52, "skips": [[24, 36]], "rewinds": 1}
    run(broken, killed, dies={2})
    assert steps_saved(broken)[-1] == 8, "it died before the later checkpoints were deleted"
    assert [end.code for end in run(broken, poisoned)] == [0] * RANKS
    assert contents(broken, 10) == contents(straight, 10)
    assert losses(broken.run.directory) == losses(straight.run.directory)

    def alone(rank: int, store: Store) -> int:
        poisoned(rank)
        with redirect_stdout(io.StringIO()):
            return train(one)

    assert run_on(1, alone, time_limit=60.0) == [0]
    assert decided(one) == decided(straight)
