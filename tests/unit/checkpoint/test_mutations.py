"""Every region of every file of a checkpoint, damaged in every way once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megallama.checkpoint import reader
from megallama.data import dataset
from tests.chaos.pairs import config_of, make_data
from tests.conftest import MakeConfig
from tests.mutations import data
from tests.mutations.checkpoint import FILES, Victim, accepted, mutations
from tests.mutations.damage import FAULTS


@pytest.fixture
def victim(make_config: MakeConfig) -> Victim:
    return Victim(make_config())


def test_damage_is_named_and_the_checkpoint_before_is_used(victim: Victim) -> None:
    assert victim.resume()[0] == 6
    kinds = list(mutations(victim))
    assert len(kinds) == (8 + 2 * 6) * len(FAULTS)
    found = {kind: accepted(victim, kind, random.Random(str(kind))) for kind in kinds}
    assert [(kind, fault) for kind, fault in found.items() if fault] == []
    assert sum(fault == "" for fault in found.values()) > 0.9 * len(kinds)
    assert victim.resume()[0] == 6


@pytest.fixture
def fed(tmp_path: Path) -> data.Data:
    """A run with two checkpoints, and data of its own."""
    make_data(tmp_path)
    return data.Data(tmp_path, Victim(config_of("1", tmp_path)))


def test_damaged_data_are_named_and_no_run_goes_on(fed: data.Data) -> None:
    kinds = list(data.mutations(fed))
    assert len(kinds) == (3 + 7 + 11 + 3) * len(FAULTS)
    found = {kind: data.accepted(fed, kind, random.Random(str(kind))) for kind in kinds}
    assert [(kind, fault) for kind, fault in found.items() if fault] == []
    assert sum(fault == "" for fault in found.values()) > 0.9 * len(kinds)
    assert fed.victim.resume()[0] == 6


@pytest.mark.parametrize("left_out", ["verify", "_check_tokenizers"])
def test_a_check_of_data_that_is_left_out_is_found(
    fed: data.Data, monkeypatch: pytest.MonkeyPatch, left_out: str
) -> None:
    monkeypatch.setattr(dataset, left_out, lambda *_: None)
    kinds = list(data.mutations(fed))
    assert any(data.accepted(fed, kind, random.Random(str(kind))) for kind in kinds)


@pytest.mark.parametrize("left_out", ["slices", "header"])
def test_a_check_that_is_left_out_is_found(
    victim: Victim, monkeypatch: pytest.MonkeyPatch, left_out: str
) -> None:
    """So the test above can fail."""
    if left_out == "slices":
        monkeypatch.setattr(reader.xxhash, "xxh3_64_hexdigest", _Anything)
    else:
        monkeypatch.setattr(reader.xxhash, "xxh3_128_hexdigest", _Anything)
    kinds = [kind for kind in mutations(victim) if kind[0] == FILES[1]]
    found = [accepted(victim, kind, random.Random(str(kind))) for kind in kinds]
    assert any(found)


class _Anything(str):
    """A digest that equals any other."""

    def __new__(cls, _: object) -> _Anything:
        return str.__new__(cls)

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__
