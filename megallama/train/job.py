"""The main job: a config trained from its start or its newest checkpoint to its end."""

from __future__ import annotations

from pathlib import Path

from megallama.checkpoint.store import Checkpoint, committed_checkpoints
from megallama.config.load import config_to_yaml
from megallama.config.schema import Config
from megallama.data.tokenizer import Tokenizer
from megallama.errors import ConfigError
from megallama.files import write_atomic
from megallama.train.build import Trainer, build_dataset, build_trainer
from megallama.train.console import Console
from megallama.train.device import bf16_is_emulated
from megallama.train.loop import Loop
from megallama.train.signals import StopSignals
from megallama.train.snapshot import Progress, find_checkpoint, newest_intact, restore


def train(config: Config, resume: str = "auto") -> int:
    """Train and return the exit code: 0 done, 75 or 130 stopped after saving.

    `resume` is `auto` (the run's newest intact checkpoint, or a new run), `none` (a new run) or the
    path of a checkpoint or run directory.

    Raises:
        UserError: the config, the data or the checkpoint cannot be used.
    """
    with StopSignals() as stop:
        dataset = build_dataset(config)
        with Console(config.train.total_steps, config.log.every) as console:
            trainer = build_trainer(config)
            progress = _start(trainer, resume, console)
            if config.train.precision == "bf16" and bf16_is_emulated(trainer.device):
                console.message(
                    "this machine has no bf16 units: bf16 runs many times slower than fp32 here; "
                    "set train.precision=fp32"
                )
            _describe(trainer, progress, console)
            tokenizer = config.data.tokenizer
            tokenizer_hash = Tokenizer(tokenizer).hash if tokenizer else None
            return Loop(trainer, dataset, progress, tokenizer_hash, console).run(stop)


def _start(trainer: Trainer, resume: str, console: Console) -> Progress:
    """Find where to begin, fill the trainer, and write the run's config.yaml."""
    directory = trainer.config.run.directory
    checkpoint = _checkpoint(directory, resume, console)
    progress = restore(trainer, checkpoint) if checkpoint else Progress()
    if checkpoint:
        console.message(f"resumed from {checkpoint.directory}")
    write_atomic(directory / "config.yaml", config_to_yaml(trainer.config).encode())
    return progress


def _checkpoint(directory: Path, resume: str, console: Console) -> Checkpoint | None:
    folder = directory / "checkpoints"
    if resume == "auto":
        return newest_intact(folder, console.message)
    if resume != "none":
        return find_checkpoint(Path(resume))
    if committed_checkpoints(folder):
        raise ConfigError(
            f"--resume none: {directory} already holds checkpoints; "
            "choose another run.name, or remove the directory"
        )
    return None


def _describe(trainer: Trainer, progress: Progress, console: Console) -> None:
    config = trainer.config
    total = config.train.total_steps
    millions = trainer.parameters / 1e6
    console.message(
        f"{config.run.name}: {millions:.1f}M parameters, {config.train.precision} on "
        f"{trainer.device}, step {progress.step} of {total}"
    )
    if progress.step >= total:
        console.message("nothing left to train")
