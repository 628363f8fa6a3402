"""The keys that a run has changed since its checkpoint, permitted and told, or refused."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from megallama.checkpoint.store import Checkpoint
from megallama.config.changes import Change, changes, refuse_changes
from megallama.config.schema import Config


def changed_keys(config: Config, path: Path, allowed: Collection[str]) -> list[Change]:
    """What differs from the config that the checkpoint at `path` was trained with, worth telling.

    Raises:
        ConfigError: a key may not be changed, or not without being `allowed`.
    """
    facts = Checkpoint(path).manifest
    samples, length = facts.state["samples"], facts.config["train"]["sequence_length"]
    found = changes(facts.config, config.model_dump(mode="json"), samples)
    return refuse_changes(found, allowed, path, samples * length)
