"""Local workers share a machine's memory: together they are refused, in one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from megallama.errors import EXIT_CONFIG
from megallama.train.memory import free_memory
from tests.conftest import TinyData
from tests.dist.commands import Command, write_config


@pytest.mark.skipif(free_memory() is None, reason="this system does not say how much it has")
def test_workers_that_do_not_fit_together_are_refused_before_they_build(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    """A hundred layers of width 8192: a terabyte in fp64."""
    config = write_config(tmp_path, tiny_data)
    words = ["train", config, "--nproc", "2", "model.d_model=8192", "model.layers=100"]
    ended = Command(tmp_path / "command", words).end()
    assert ended.code == EXIT_CONFIG, ended.error
    first, *ledger = ended.error.splitlines()
    assert "the 2 ranks of this machine would hold " in first
    assert ledger[-1].startswith("sum: ")
    assert ended.error.count("error: ") == 1
    assert not (tmp_path / "runs").exists()
