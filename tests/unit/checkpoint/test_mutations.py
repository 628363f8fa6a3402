"""Every region of every file of a checkpoint, damaged in every way once."""

from __future__ import annotations

import random

import pytest

from megallama.checkpoint import reader
from tests.conftest import MakeConfig
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
