"""The first meeting of a job's processes, before any trains."""

from __future__ import annotations

from datetime import timedelta

import pytest
from torch.distributed import HashStore

from megallama.errors import LostError
from megallama.train import launch, meeting, pulse
from megallama.train.process import Process
from megallama.train.signals import StopSignals


def test_a_rank_that_never_starts_is_named_within_the_store_s_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And not after the hour that a meeting's slowest rank has."""
    monkeypatch.setattr(meeting, "PATIENCE", timedelta(seconds=20))
    monkeypatch.setattr(launch, "LAST_WORDS", timedelta(seconds=0.1))
    for module in (launch, pulse):
        monkeypatch.setattr(module, "STORE_TIMEOUT", timedelta(seconds=1))
    process = Process(0, 2, 0, 1, HashStore(), None)
    with StopSignals() as stop, pytest.raises(LostError) as caught:
        launch._work_under_launcher(process, stop, lambda size: None, lambda *arguments: 0)
    assert str(caught.value) == (
        "rank 1 is lost: it gave no sign of life, and is waited for (meeting megallama/launch/0/0)"
        "; try again"
    )
