"""The main job: a config trained from its start or its newest checkpoint to its end."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import closing, nullcontext

import torch

from megallama.config.load import config_to_yaml
from megallama.config.schema import Config
from megallama.data.dataset import Dataset
from megallama.errors import ConfigError
from megallama.files import Disk, refuse_os_errors, write_atomic
from megallama.train.agree import same_everywhere
from megallama.train.build import NO_DATA, Trainer, build_trainer
from megallama.train.changed import changed_keys
from megallama.train.console import Console
from megallama.train.device import bf16_is_emulated
from megallama.train.init_from import take_weights, with_origin
from megallama.train.lease import sole_writer
from megallama.train.loop import Loop
from megallama.train.meeting import Meeting
from megallama.train.memory import explained, refuse_too_large
from megallama.train.process import ALONE, Process
from megallama.train.pulse import Pulse
from megallama.train.resume import begin, candidates
from megallama.train.signals import StopSignals
from megallama.train.snapshot import Progress


def train(
    config: Config,
    resume: str = "auto",
    stop: StopSignals | None = None,
    process: Process = ALONE,
    allowed: Collection[str] = (),
) -> int:
    """Train and return the exit code: 0 done, 75 or 130 stopped after saving.

    `resume` is `auto` (the run's newest intact checkpoint, or a new run), `none` (a new run) or the
    path of a checkpoint or run directory; `allowed` are the keys that may have other values than
    the checkpoint was trained with (`config.changes`). A caller that listens for signals already
    gives `stop`. All processes of a job call it alike; `process` is this one's place among them.

    Raises:
        UserError: the config, the data or the checkpoint cannot be used. What one process finds
            before training, every process raises.
    """
    with (
        nullcontext(stop) if stop else StopSignals() as stop,
        Pulse(process, config.parallel.timeout_seconds) as pulse,
    ):
        meeting = Meeting(process, pulse=pulse)
        dataset = same_everywhere(config, meeting)
        if dataset is None:
            raise ConfigError(NO_DATA)
        meeting.hold(lambda: refuse_too_large(config, process))
        with (
            explained(config, process),
            Console(config.train.total_steps, config.log.every, not meeting.leads) as console,
        ):
            say = console.message
            trainer = build_trainer(config, process)
            with closing(trainer.groups), sole_writer(config.run.directory, meeting, say) as lease:
                paths = candidates(config.run.directory, resume, meeting)
                resumed_from, progress = begin(trainer, paths, dataset, meeting, say)
                if resumed_from:
                    if changed := changed_keys(config, resumed_from, allowed):
                        say(f"changed since: {', '.join(map(str, changed))}")
                    trainer = with_origin(trainer, resumed_from)
                elif config.run.init_from:
                    take_weights(trainer, dataset, meeting, say)
                _open_directory(trainer.config, meeting)
                _describe(trainer, dataset, progress, console)
                loop = Loop(trainer, dataset, progress, console, meeting, resumed_from, lease)
                return loop.run(stop)


def _open_directory(config: Config, meeting: Meeting) -> None:
    """Make the run's directory, and write its config.yaml.

    Raises:
        ConfigError: it cannot be written, or is not the same one on every rank.
    """
    directory = config.run.directory
    folder = directory / "checkpoints"

    def make() -> str:
        if meeting.leads:
            with refuse_os_errors("write", folder):  # now, rather than after hours of training
                Disk().make(folder)
            write_atomic(directory / "config.yaml", config_to_yaml(config).encode())
        return ""

    def see() -> str:
        if not folder.is_dir():
            raise ConfigError(
                f"run.root={config.run.root}: rank {meeting.process.rank} does not see the "
                "directory that rank 0 made there; choose one that all machines share"
            )
        return ""

    meeting.hold(make)
    meeting.hold(see)


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
    for name in dataset.unverified:
        console.message(
            f"data source {name!r}: its bytes are not verified here (over 64 MiB, or no sidecar); "
            "run `megallama data inspect` on it once"
        )
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
