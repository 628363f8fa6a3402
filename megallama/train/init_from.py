"""Beginning a run from the weights alone of a checkpoint: continued pretraining."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megallama.checkpoint.manifest import MANIFEST
from megallama.checkpoint.store import Checkpoint, Want
from megallama.checkpoint.weights import MASTER
from megallama.config.changes import refuse_other_shape
from megallama.config.schema import Config
from megallama.data.dataset import Dataset
from megallama.errors import ConfigError
from megallama.train.agree import refuse_differences
from megallama.train.build import Trainer
from megallama.train.meeting import Meeting
from megallama.train.snapshot import find_checkpoint


def take_weights(
    trainer: Trainer, dataset: Dataset, meeting: Meeting, say: Callable[[str], None]
) -> None:
    """Fill the masters from the checkpoint at `run.init_from`, of any layout; moments stay zero.

    Raises:
        ConfigError: it is of another shape or tokenizer, or not the same one on every rank.
        CorruptError: it is damaged.
    """
    config = trainer.config
    path = config.run.init_from
    assert path is not None
    told: list[str] = []

    def read() -> str:
        checkpoint = find_checkpoint(path)
        facts = checkpoint.manifest
        told.extend(
            map(str, refuse_other_shape(facts.config, config.model_dump(mode="json"), path))
        )
        _refuse_other_tokenizer(facts.tokenizer_hash, dataset, path)
        state = trainer.model.state
        checkpoint.fill(
            (
                Want(f"{MASTER}/{piece.part.name}", piece.region, tensor)
                for piece, tensor in state.pieces(state.masters)
            ),
            near=trainer.place.rank,
        )
        manifest = (checkpoint.directory / MANIFEST).read_bytes()
        digest = hashlib.blake2b(manifest).hexdigest()
        return json.dumps({f"the checkpoint {checkpoint.directory}": digest})

    with trainer.zero.changing_masters():
        meeting.hold(read, refuse_differences)
    say(f"weights from {path}")
    if told:
        say(f"the model differs from theirs: {', '.join(told)}")


def with_origin(trainer: Trainer, resumed_from: Path) -> Trainer:
    """The trainer, its config saying where the resumed run's weights once came from.

    Raises:
        ConfigError: the config names another place: the run has begun already.
    """
    config = trainer.config
    recorded = Checkpoint(resumed_from).manifest.config["run"].get("init_from")
    wanted = config.run.init_from
    if wanted is not None and str(wanted) != recorded:
        began = f"from {recorded}" if recorded else "without"
        raise ConfigError(
            f"run.init_from={wanted}: the run of {resumed_from} began {began}; leave it out to go "
            "on, or choose another run.name to begin anew"
        )
    return replace(trainer, config=_from(config, recorded))


def _from(config: Config, origin: str | None) -> Config:
    where = None if origin is None else Path(origin)
    return config.model_copy(update={"run": config.run.model_copy(update={"init_from": where})})


def _refuse_other_tokenizer(theirs: str | None, dataset: Dataset, path: Path) -> None:
    ours = dataset.tokenizer_hash
    if theirs is not None and ours is not None and theirs != ours:
        raise ConfigError(
            f"run.init_from={path}: those weights were trained with tokenizer {theirs}, "
            f"data.tokenizer is {ours}; use theirs, and data built with it"
        )
