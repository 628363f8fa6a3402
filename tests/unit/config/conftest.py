"""A valid config as a mapping, and the faults of a spoilt one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megallama.config import ConfigError, parse_config

Mapping = dict[str, Any]


@pytest.fixture
def tiny() -> Mapping:
    return {
        "model": {"d_model": 64, "layers": 2, "heads": 4, "ffn": 96, "vocab": 256},
        "train": {"steps": 1000, "sequence_length": 32, "global_batch": 8},
        "optimizer": {"lr": 1e-3},
    }


@pytest.fixture
def faults(tiny: Mapping) -> Callable[[Mapping], list[str]]:
    """The lines that refuse the tiny config with these `section.key` values set."""

    def refuse(changes: Mapping) -> list[str]:
        for place, value in changes.items():
            section, _, key = place.partition(".")
            if key:
                tiny.setdefault(section, {})[key] = value
            else:
                tiny[section] = value
        with pytest.raises(ConfigError) as caught:
            parse_config(tiny)
        assert caught.value.exit_code == 78
        return str(caught.value).splitlines()

    return refuse
