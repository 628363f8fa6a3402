"""How many kinds of ranks the presets' jobs have."""

from __future__ import annotations

from pathlib import Path

import pytest

from megallama.check.classes import classes
from megallama.config.load import load_config
from megallama.spec.grid import make_grid

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize("name", ["llama-65b", "llama2-70b"])
def test_data_ranks_differ_only_where_the_vocabulary_is_padded(name: str) -> None:
    """Four stages; the first tensor rank counts; 63 rows of 8,000 for each of 128 data ranks leave
    the last but one 62 and the last none, of the embedding and of the head."""
    config = load_config(CONFIGS / f"{name}.yaml", [])
    found = classes(config, make_grid(config, 2048))
    assert sorted(len(ranks) for ranks in found) == sorted(
        2 * [1, 3, 1, 3, 126, 3 * 126] + 2 * [128, 3 * 128]
    )
