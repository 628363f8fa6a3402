"""The main job: a config trained from its start or its newest checkpoint to its end."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch

from megallama.checkpoint.store import Checkpoint, committed_checkpoints
from megallama.config.load import config_to_yaml
from megallama.config.schema import Config
from megallama.data.dataset import Dataset
from megallama.errors import ConfigError
from megallama.files import refuse_os_errors, write_atomic
from megallama.train.build import Trainer, build_dataset, build_trainer
from megallama.train.console import Console
from megallama.train.device import bf16_is_emulated
from megallama.train.loop import Loop
from megallama.train.signals import StopSignals
from megallama.train.snapshot import Progress, find_checkpoint, newest_intact, restore


def train(config: Config, resume: str = "auto", stop: StopSignals | None = None) -> int:
    """Train and return the exit code: 0 done, 75 or 130 stopped after saving.

    `resume` is `auto` (the run's newest intact checkpoint, or a new run), `none` (a new run) or the
    path of a checkpoint or run directory. A caller that listens for signals already gives `stop`.

    Raises:
        UserError: the config, the data or the checkpoint cannot be used.
    """
    with nullcontext(stop) if stop else StopSignals() as stop:
        dataset = build_dataset(config)
        with Console(config.train.total_steps, config.log.every) as console:
            trainer = build_trainer(config)
            checkpoint = _checkpoint(config.run.directory, resume, console)
            progress = _start(trainer, checkpoint, dataset, console)
            _describe(trainer, dataset, progress, console)
            resumed_from = checkpoint.directory if checkpoint else None
            loop = Loop(trainer, dataset, progress, console, resumed_from)
            return loop.run(stop)


def _start(
    trainer: Trainer, checkpoint: Checkpoint | None, dataset: Dataset, console: Console
) -> Progress:
    """Fill the trainer, and write the run's config.yaml."""
    progress = Progress()
    if checkpoint:
        progress = restore(trainer, checkpoint, dataset)
        console.message(f"resumed from {checkpoint.directory}")
    directory = trainer.config.run.directory
    write_atomic(directory / "config.yaml", config_to_yaml(trainer.config).encode())
    folder = directory / "checkpoints"
    with refuse_os_errors("write", folder):  # now, rather than after hours of training
        folder.mkdir(exist_ok=True)
    return progress


def _checkpoint(directory: Path, resume: str, console: Console) -> Checkpoint | None:
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
        f"{trainer.device}, step {progress.step} of {total}"
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
