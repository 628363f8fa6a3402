"""The stash: each set is taken once, and its bytes are those of its storages."""

from __future__ import annotations

import pytest
import torch

from megallama.autograd.stash import Stash


def test_a_set_is_taken_once():
    stash = Stash()
    saved = {"x": torch.zeros(2)}
    stash.put((0, "layer"), saved)
    assert len(stash) == 1
    assert stash.peek((0, "layer")) is saved
    assert stash.take((0, "layer")) is saved
    assert len(stash) == 0
    with pytest.raises(KeyError):
        stash.take((0, "layer"))


def test_bytes_count_each_storage_once_and_whole():
    stash = Stash()
    whole = torch.zeros(10, 4)
    stash.put(0, {"a": whole, "b": whole[:2]})
    stash.put(1, {"c": whole[5:], "d": torch.zeros(3, dtype=torch.bfloat16)})
    assert stash.bytes_held() == 10 * 4 * 4 + 3 * 2
    stash.take(0)
    assert stash.bytes_held() == 10 * 4 * 4 + 3 * 2, "a view keeps its storage alive"
    stash.take(1)
    assert stash.bytes_held() == 0


def test_a_key_in_use_is_refused():
    """Two micro-batches in one stash would exchange their activations in silence."""
    stash = Stash()
    stash.put(0, {})
    with pytest.raises(KeyError, match="waiting for its backward"):
        stash.put(0, {})
