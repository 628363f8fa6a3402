"""What every process of a job must have alike before it trains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from megallama.config.schema import Config
from megallama.data.dataset import Dataset
from megallama.errors import ConfigError
from megallama.spec.grid import make_grid
from megallama.train.build import build_dataset
from megallama.train.device import choose_device
from megallama.train.meeting import Meeting


def same_everywhere(config: Config, meeting: Meeting) -> Dataset | None:
    """The run's samples, once every process has the same config, data and kind of device.

    None where the config names no data.

    Raises:
        UserError: a process cannot use the config or its data, or has others than rank 0.
    """
    opened: list[Dataset] = []

    def open_data() -> str:
        make_grid(config, meeting.process.size)
        device = choose_device(config, meeting.process.local_rank)
        if not config.data.is_empty:
            opened.append(build_dataset(config))
        return json.dumps(_facts(config, *opened) | {"the kind of device": device.type})

    meeting.hold(open_data, refuse_differences)
    return opened[0] if opened else None


def refuse_differences(ranks: Sequence[str]) -> str:
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


def _facts(config: Config, dataset: Dataset | None = None) -> dict[str, Any]:
    """What every rank must have alike, by its name."""
    sections = config.model_dump(mode="json").items()
    facts = {f"{section}.{key}": value for section, keys in sections for key, value in keys.items()}
    if dataset:
        facts["data.tokenizer's hash"] = dataset.tokenizer_hash
        facts |= {f"data source {name!r}": mark for name, mark in dataset.fingerprints.items()}
    return facts
