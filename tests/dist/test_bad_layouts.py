"""Layouts, ranks and files that do not fit: refused before any training, once, by every rank.

All of it names the same run, which exists and must stay as it was.
"""

from __future__ import annotations

import re
import shutil
import socket
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.distributed import TCPStore

from megallama.checkpoint.store import committed_checkpoints
from tests.conftest import TinyData
from tests.dist.commands import Command, Ended, last_step, write_config

LOCALHOST = "127.0.0.1"
ERROR = "megallama: error: "
#: Name → the words of a command, and what the whole of its error matches after ERROR.
REFUSED: dict[str, tuple[str, str]] = {
    "heads": (
        "--nproc 4 parallel.tensor=4 model.heads=6 model.d_model=24",
        r"parallel.tensor=4: does not divide model.heads=6; the nearest that divides is 3 or 6",
    ),
    "kv-heads": (
        "--nproc 6 parallel.tensor=6 model.heads=12 model.d_model=24 model.kv_heads=4 "
        "train.sequence_length=36",
        r"parallel.tensor=6: neither divides model.kv_heads=4 nor is a multiple of it; .* is 4",
    ),
    "ffn": (
        "--nproc 2 parallel.tensor=2 model.ffn=25",
        r"parallel.tensor=2: does not divide model.ffn=25; the nearest that divides is 1 or 5",
    ),
    "sequence": (
        "--nproc 2 parallel.tensor=2 train.sequence_length=33",
        r"train.sequence_length=33: is not a multiple of parallel.tensor=2; .* is 32 or 34, or .*",
    ),
    "chunks": (
        "--nproc 2 parallel.tensor=2 parallel.overlap=full train.sequence_length=34",
        r"train.sequence_length=34: is not a multiple of parallel.tensor=2 x the 2 chunks .*",
    ),
    "micro-batch": (
        "--nproc 2 train.micro_batch=3",
        r"train.global_batch=4: is not a multiple of train.micro_batch=3; .* is 3 or 6",
    ),
    "batch": (
        "--nproc 2 train.micro_batch=4",
        r"train.global_batch=4: is not a multiple of train.micro_batch=4 x 2 data ranks; 8 is",
    ),
    "batch-given-data": (
        "--nproc 3 parallel.data=3",
        r"train.global_batch=4: is not a multiple of train.micro_batch=1 x parallel.data=3; .*",
    ),
    "too-many": (
        "--nproc 3 parallel.tensor=2",
        r"parallel.tensor=2: 3 processes do not make this grid; start 2 \(--nproc 2 .*",
    ),
    "too-few": (
        "--nproc 2 parallel.tensor=4",
        r"parallel.tensor=4: 2 processes do not make this grid; start 4 \(--nproc 4 .*",
    ),
    "alone": (
        "parallel.tensor=2",
        r"parallel.tensor=2: 1 process does not make this grid; start 2 .*",
    ),
    "data": (
        "--nproc 4 parallel.data=2",
        r"parallel.tensor=1 x parallel.data=2: 4 processes do not make this grid; start 2 .*",
    ),
    "stages": (
        "--nproc 4 parallel.pipeline=4",
        r"parallel.pipeline=4: x 1 chunk on a rank exceeds model.layers=2, .* fits is 2",
    ),
    "virtual-stages": (
        "--nproc 2 parallel.pipeline=2 parallel.schedule=interleaved",
        r"parallel.pipeline=2: x 2 chunks on a rank exceeds model.layers=2, .* fits is 1",
    ),
    "zb-v": (
        "--nproc 2 parallel.pipeline=2 parallel.schedule=zb-v parallel.virtual_stages=3 "
        "model.layers=6",
        r"parallel.virtual_stages=3: parallel.schedule=zb-v takes 2; leave it out, or .*",
    ),
    "schedule": (
        "--nproc 2 parallel.pipeline=2 parallel.schedule=zbh1",
        r"parallel.schedule=zbh1: is not a choice; use 'gpipe', .*",
    ),
    "split": (
        "--nproc 2 parallel.pipeline=2 parallel.stage_layers=[2,1]",
        r"parallel.stage_layers=\[2, 1\]: sums to 3, not model.layers=2; give 2 .*",
    ),
    "split-of-three": (
        "--nproc 2 parallel.pipeline=2 parallel.stage_layers=[1,1,1]",
        r"parallel.stage_layers=\[1, 1, 1\]: has 3 entries for 2 chunks; give 2 .*",
    ),
    "too-few-for-stages": (
        "--nproc 3 parallel.pipeline=2",
        r"parallel.tensor=1 x parallel.pipeline=2: 3 processes do not make this grid; start 2 .*",
    ),
    "one-for-stages": (
        "parallel.pipeline=2 parallel.tensor=2",
        r"parallel.tensor=2 x parallel.pipeline=2: 1 process does not .*; start 4 .*",
    ),
    "no-process": ("--nproc 0", r"--nproc 0: at least 1 process is needed"),
    "no-number": ("--nproc two", r"argument --nproc: invalid int value: 'two'; see .*"),
    "dry-run": (
        "--dry-run --nproc 2 parallel.tensor=4",
        r"parallel.tensor=4: 2 processes do not make this grid; .*",
    ),
    "no-tokenizer": (
        "--nproc 2 data.tokenizer=nowhere.model",
        r"cannot read the tokenizer nowhere.model: No such file or directory",
    ),
    "no-data": (
        "--nproc 2 data.mixture.0.path=nowhere",
        r".*nowhere.*",
    ),
    "no-folder": (
        "--nproc 2 run.root=/proc/runs",
        r"cannot write /proc/runs/held.*: No such file or directory",
    ),
    "no-folder-for-checkpoints": (
        "--nproc 2 run.name=blocked",
        r"cannot list .*/blocked/checkpoints: Not a directory",
    ),
}
#: Name → the words of rank 0, those of rank 1, and what the one error of both contains.
DIFFERENT: dict[str, tuple[str, str, str]] = {
    "seed": ("run.seed=1", "run.seed=2", "run.seed: rank 1 has 2, rank 0 has 1"),
    "rate": ("", "optimizer.lr=0.5", "optimizer.lr: rank 1 has 0.5, rank 0 has 0.003"),
    "layout": ("parallel.tensor=2", "", "parallel.tensor: rank 1 has 1, rank 0 has 2"),
    "schedules": (
        "parallel.pipeline=2 parallel.schedule=zb-h1",
        "parallel.pipeline=2 parallel.schedule=zb-h2",
        "parallel.schedule: rank 1 has zb-h2, rank 0 has zb-h1",
    ),
    "run": ("", "run.name=other", "run.name: rank 1 has other, rank 0 has held"),
    "no-data-on-one": ("", "data.mixture.0.path=nowhere", "nowhere"),
    "no-tokenizer-on-one": ("data.tokenizer=nowhere.model", "", "nowhere.model"),
    "same-path": ("data.mixture.0.path=here", "data.mixture.0.path=here", "data source 'code'"),
    "grid": ("parallel.tensor=4", "parallel.tensor=4", "2 processes do not make this grid"),
    "bad-config": ("", "model.ffn=0", "model.ffn=0"),
    "two-launchers": ("--nproc 2", "--nproc 2", "--nproc 2: a launcher already started 2"),
}


#: Ranks that srun starts, where rank 0 serves the store and leaves it to nobody.
HOSTED = {
    "hosted-seed": ("run.seed=1", "run.seed=2", "run.seed: rank 1 has 2, rank 0 has 1"),
    "hosted-grid": ("parallel.tensor=4", "parallel.tensor=4", "2 processes do not make this grid"),
}
#: Run with damaged checkpoints → how many of its two are.
DAMAGED = {"newest-damaged": 1, "all-damaged": 2}


class Refusals(NamedTuple):
    """How the commands ended, and the run's files before and after."""

    folder: Path
    ended: dict[str, Ended]
    ranks: dict[str, list[Ended]]
    before: dict[str, bytes]
    after: dict[str, bytes]


@pytest.fixture(scope="module")
def refusals(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Refusals:
    folder = tmp_path_factory.mktemp("bad-layouts")
    config = write_config(folder, tiny_data, train={"steps": 4}, checkpoint={"every": 2})
    base = ["train", str(config), "run.name=held"]
    runs = folder / "runs"
    grid = ["--nproc", "2", "parallel.tensor=2"]
    assert Command(folder / "held", [*base, *grid]).end().code == 0
    (runs / "blocked").mkdir()
    (runs / "blocked" / "checkpoints").touch()
    for name, count in DAMAGED.items():
        damage(runs / "held", runs / name, count)
    for rank, source in enumerate(tiny_data.prefixes.values()):
        here = folder / "same-path" / f"rank-{rank}"
        here.mkdir(parents=True)
        for suffix in (".bin", ".idx", ".json"):
            shutil.copy(f"{source}{suffix}", here / f"here{suffix}")
    before = contents(runs / "held")
    commands: dict[str, list[Command]] = {}
    stores = []
    try:
        for name, (words, _) in REFUSED.items():
            commands[name] = [Command(folder / name / "alone", [*base, *words.split()])]
        for name in DAMAGED:
            words = [*base, f"run.name={name}", *grid, "train.steps=6"]
            commands[name] = [Command(folder / name / "alone", words)]
        for name, pair in {**DIFFERENT, **HOSTED}.items():
            port = free_port()
            if name in DIFFERENT:
                stores.append(TCPStore(LOCALHOST, port, is_master=True, wait_for_workers=False))
            commands[name] = [
                Command(
                    folder / name / f"rank-{rank}",
                    [*base, *words.split()],
                    (torchrun_variables if name in DIFFERENT else srun_variables)(rank, port),
                )
                for rank, words in enumerate(pair[:2])
            ]
        ended = {name: [command.end() for command in its] for name, its in commands.items()}
    finally:
        for its in commands.values():
            for command in its:
                command.kill()
    alone = {name: its[0] for name, its in ended.items() if len(its) == 1}
    ranks = {name: its for name, its in ended.items() if len(its) > 1}
    return Refusals(folder, alone, ranks, before, contents(runs / "held"))


def damage(run: Path, copy: Path, count: int) -> None:
    """A copy of a run, with one byte flipped in rank 1's file of its newest checkpoints."""
    shutil.copytree(run, copy)
    for directory in committed_checkpoints(copy / "checkpoints")[-count:]:
        path = directory / "rank-00001.safetensors"
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def free_port() -> int:
    with socket.create_server((LOCALHOST, 0)) as listener:
        return int(listener.getsockname()[1])


def torchrun_variables(rank: int, port: int) -> dict[str, str]:
    """The environment of one of two ranks whose agent serves the store."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": LOCALHOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def srun_variables(rank: int, port: int) -> dict[str, str]:
    """The environment of one of the two tasks of a step on one node."""
    return {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "MASTER_ADDR": LOCALHOST,
        "MASTER_PORT": str(port),
    }


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(refusals: Refusals, name: str) -> None:
    code, output, error = refusals.ended[name]
    assert code == 78, error
    assert re.fullmatch(f"{ERROR}{REFUSED[name][1]}\n", error), error
    assert "grad_norm" not in output


@pytest.mark.parametrize("name", [*DIFFERENT, *HOSTED])
def test_ranks_that_differ_are_all_refused(refusals: Refusals, name: str) -> None:
    ended = refusals.ranks[name]
    error = "".join(end.error for end in ended)
    assert [end.code for end in ended] == [78, 78], error
    assert error.count("\n") == 1, error
    assert error.startswith(ERROR)
    assert {**DIFFERENT, **HOSTED}[name][2] in error
    assert "grad_norm" not in ended[0].output + ended[1].output


def test_a_refusal_leaves_the_run_as_it_was(refusals: Refusals) -> None:
    assert refusals.after == refusals.before
    made = {path.name for path in (refusals.folder / "runs").iterdir()}
    assert made == {"held", "blocked", *DAMAGED}


def test_a_damaged_checkpoint_is_passed_over(refusals: Refusals) -> None:
    code, output, error = refusals.ended["newest-damaged"]
    assert (code, error) == (0, "")
    assert output.count("passed over a damaged checkpoint: ") == 1
    assert output.count("step-00000004/rank-00001.safetensors: tensor ") == 1
    assert output.count("checkpoints/step-00000002\n") == 1
    assert last_step(refusals.folder / "runs" / "newest-damaged") == 6


def test_damage_to_every_checkpoint_is_refused(refusals: Refusals) -> None:
    code, _, error = refusals.ended["all-damaged"]
    assert code == 65
    assert re.fullmatch(f"{ERROR}.*: none of its 2 checkpoints is intact; .*\n", error)
