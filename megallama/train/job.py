"""The main job: a config trained from its start or its newest checkpoint to its end."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path

import torch

from megallama.checkpoint.manifest import MANIFEST
from megallama.checkpoint.store import Checkpoint, committed_checkpoints
from megallama.config.load import config_to_yaml
from megallama.config.schema import Config
from megallama.data.dataset import Dataset
from megallama.errors import ConfigError
from megallama.files import refuse_os_errors, write_atomic
from megallama.train.agree import refuse_differences, same_everywhere
from megallama.train.build import NO_DATA, Trainer, build_trainer
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
        dataset = same_everywhere(config, meeting)
        if dataset is None:
            raise ConfigError(NO_DATA)
        quiet = not meeting.leads
        with Console(config.train.total_steps, config.log.every, quiet) as console:
            trainer = build_trainer(config, process)
            try:
                resumed_from = _checkpoint(config.run.directory, resume, console, meeting)
                progress = _start(trainer, resumed_from, dataset, console, meeting)
                _describe(trainer, dataset, progress, console)
                loop = Loop(trainer, dataset, progress, console, meeting, resumed_from)
                return loop.run(stop)
            finally:
                trainer.groups.close()


def _start(
    trainer: Trainer,
    resumed_from: Path | None,
    dataset: Dataset,
    console: Console,
    meeting: Meeting,
) -> Progress:
    """Fill the trainer, and write the run's config.yaml.

    Raises:
        ConfigError: the run's directory cannot be written, or is not the same one on every rank.
    """
    started: list[Progress] = []
    directory = trainer.config.run.directory

    def start() -> str:
        digest = ""
        if resumed_from:
            checkpoint = Checkpoint(resumed_from)
            digest = hashlib.blake2b((resumed_from / MANIFEST).read_bytes()).hexdigest()
            started.append(restore(trainer, checkpoint, dataset))
        else:
            started.append(Progress())
        if meeting.leads:
            write_atomic(directory / "config.yaml", config_to_yaml(trainer.config).encode())
            folder = directory / "checkpoints"
            with refuse_os_errors("write", folder):  # now, rather than after hours of training
                folder.mkdir(exist_ok=True)
        return json.dumps({f"the checkpoint {resumed_from}": digest})

    def see() -> str:
        if not (directory / "checkpoints").is_dir():
            raise ConfigError(
                f"run.root={trainer.config.run.root}: rank {meeting.process.rank} does not see the "
                "directory that rank 0 made there; choose one that all machines share"
            )
        return ""

    meeting.hold(start, refuse_differences)
    meeting.hold(see)
    if resumed_from:
        console.message(f"resumed from {resumed_from}")
    return started[0]


def _checkpoint(directory: Path, resume: str, console: Console, meeting: Meeting) -> Path | None:
    """Where to begin: rank 0 looks and verifies, the others take its word."""

    def find() -> str:
        found = _find_checkpoint(directory, resume, console) if meeting.leads else None
        return str(found.directory) if found else ""

    path = meeting.hold(find)
    return Path(path) if path else None


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
    axes = f"tensor {grid.tensor} x data {grid.data}"
    if grid.pipeline > 1:
        axes = f"{axes} x pipeline {grid.pipeline}, {trainer.config.parallel.schedule}"
    return f"{grid.size} {kind} ranks ({axes})"
