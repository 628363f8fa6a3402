"""The main job: a config trained from its start or its newest checkpoint to its end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from megallama.checkpoint.store import Checkpoint, committed_checkpoints
from megallama.config.load import config_to_yaml
from megallama.config.schema import Config
from megallama.data.dataset import Dataset
from megallama.errors import ConfigError
from megallama.files import refuse_os_errors, write_atomic
from megallama.spec.grid import make_grid
from megallama.train.build import Trainer, build_dataset, build_trainer
from megallama.train.console import Console
from megallama.train.device import bf16_is_emulated
from megallama.train.loop import Loop
from megallama.train.meeting import Meeting
from megallama.train.process import ALONE, Process
from megallama.train.signals import StopSignals
from megallama.train.snapshot import Progress, find_checkpoint, newest_intact, restore


def train(
    config: Config,
    resume: str = "auto",
    stop: StopSignals | None = None,
    process: Process = ALONE,
) -> int:
    """Train and return the exit code: 0 done, 75 or 130 stopped after saving.

    `resume` is `auto` (the run's newest intact checkpoint, or a new run), `none` (a new run) or the
    path of a checkpoint or run directory. A caller that listens for signals already gives `stop`.
    All processes of a job call it alike; `process` is this one's place among them.

    Raises:
        UserError: the config, the data or the checkpoint cannot be used. What one process finds
            before training, every process raises.
    """
    with nullcontext(stop) if stop else StopSignals() as stop:
        meeting = Meeting(process)
        dataset = _same_everywhere(config, meeting)
        quiet = not meeting.leads
        with Console(config.train.total_steps, config.log.every, quiet) as console:
            trainer = build_trainer(config, process)
            try:
                checkpoint = _checkpoint(config.run.directory, resume, console, meeting)
                progress = _start(trainer, checkpoint, dataset, console, meeting)
                _describe(trainer, dataset, progress, console)
                resumed_from = checkpoint.directory if checkpoint else None
                loop = Loop(trainer, dataset, progress, console, meeting, resumed_from)
                return loop.run(stop)
            finally:
                trainer.groups.close()


def _same_everywhere(config: Config, meeting: Meeting) -> Dataset:
    """The run's samples, once every process has the same config and the same data.

    Raises:
        UserError: a process cannot use the config or its data, or has others than rank 0.
    """
    opened: list[Dataset] = []

    def open_data() -> str:
        make_grid(config, meeting.process.size)
        opened.append(build_dataset(config))
        return json.dumps(_facts(config, opened[0]))

    meeting.hold(open_data, _refuse_differences)
    return opened[0]


def _facts(config: Config, dataset: Dataset) -> dict[str, Any]:
    """What every rank must have alike, by its name."""
    sections = config.model_dump(mode="json").items()
    facts = {f"{section}.{key}": value for section, keys in sections for key, value in keys.items()}
    facts["data.tokenizer's hash"] = dataset.tokenizer_hash
    return facts | {f"data source {name!r}": mark for name, mark in dataset.fingerprints.items()}


def _refuse_differences(ranks: Sequence[str]) -> str:
    """Rank 0's facts. Raises ConfigError at the first rank that has others."""
    first = json.loads(ranks[0])
    for rank, text in enumerate(ranks):
        if text == ranks[0]:
            continue
        facts = json.loads(text)
        name = next(n for n in first | facts if facts.get(n) != first.get(n))
        raise ConfigError(
            f"{name}: rank {rank} has {facts.get(name)}, rank 0 has {first.get(name)}; start every "
            "rank with the same config and the same files"
        )
    return ranks[0]


def _start(
    trainer: Trainer,
    checkpoint: Checkpoint | None,
    dataset: Dataset,
    console: Console,
    meeting: Meeting,
) -> Progress:
    """Fill the trainer, and write the run's config.yaml."""
    started: list[Progress] = []
    directory = trainer.config.run.directory

    def start() -> str:
        started.append(restore(trainer, checkpoint, dataset) if checkpoint else Progress())
        if meeting.leads:
            write_atomic(directory / "config.yaml", config_to_yaml(trainer.config).encode())
            folder = directory / "checkpoints"
            with refuse_os_errors("write", folder):  # now, rather than after hours of training
                folder.mkdir(exist_ok=True)
        return ""

    meeting.hold(start)
    if checkpoint:
        console.message(f"resumed from {checkpoint.directory}")
    return started[0]


def _checkpoint(
    directory: Path, resume: str, console: Console, meeting: Meeting
) -> Checkpoint | None:
    """Where to begin: rank 0 looks and verifies, the others take its word."""

    def find() -> str:
        found = _find_checkpoint(directory, resume, console) if meeting.leads else None
        return str(found.directory) if found else ""

    path = meeting.hold(find)
    return Checkpoint(Path(path)) if path else None


def _find_checkpoint(directory: Path, resume: str, console: Console) -> Checkpoint | None:
    """Where to begin. Refuses what would leave checkpoints of another course in the run."""
    folder = directory / "checkpoints"
    if resume == "auto":
        return newest_intact(folder, console.message)
    own = committed_checkpoints(folder)
    if resume == "none":
        if own:
            raise ConfigError(
                f"--resume none: {directory} already holds checkpoints; "
                "choose another run.name, or remove the directory"
            )
        return None
    checkpoint = find_checkpoint(Path(resume))
    if own and own[-1].resolve() != checkpoint.directory.resolve():
        raise ConfigError(
            f"--resume {resume}: {directory} has a checkpoint of its own, {own[-1].name}; "
            "use --resume auto, choose another run.name, or remove those after it"
        )
    return checkpoint


def _describe(trainer: Trainer, dataset: Dataset, progress: Progress, console: Console) -> None:
    """Say what is about to run, and what of it may surprise."""
    config = trainer.config
    total = config.train.total_steps
    millions = trainer.parameters / 1e6
    console.message(
        f"{config.run.name}: {millions:.1f}M parameters, {config.train.precision} on "
        f"{_ranks(trainer)}, step {progress.step} of {total}"
    )
    if config.train.precision == "bf16" and bf16_is_emulated(trainer.device):
        console.message(
            "this machine has no bf16 units: bf16 runs many times slower than fp32 here; "
            "set train.precision=fp32"
        )
    if trainer.device.type == "cpu" and torch.cuda.is_available():
        console.message("the GPU is not used: on CUDA train.precision is bf16")
    for phase in range(len(config.data.all_phases)):
        mixture = dataset.order.mixture(phase)
        if not mixture.exact:
            shares = ", ".join(f"{share}/{mixture.period}" for share in mixture.shares)
            console.message(f"phase {phase}: the mixture's weights are rounded to {shares}")
    if progress.step >= total:
        console.message("nothing left to train")


def _ranks(trainer: Trainer) -> str:
    """Such as `cpu`, or `4 cpu ranks (tensor 2 x data 2)`."""
    grid, kind = trainer.place.grid, trainer.device.type
    if grid.size == 1:
        return str(trainer.device)
    return f"{grid.size} {kind} ranks (tensor {grid.tensor} x data {grid.data})"
