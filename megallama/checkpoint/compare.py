"""Two checkpoints compared bit for bit, whatever layouts wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megallama.checkpoint.store import Checkpoint
from megallama.checkpoint.weights import MASTER, stored_regions

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # of so many bytes


@dataclass(frozen=True)
class Difference:
    """What differs, by name: old and new value of the config's keys and of the run's counters (None
    where one has no such key), and what is the matter with a tensor."""

    config: dict[str, tuple[Any, Any]]
    state: dict[str, tuple[Any, Any]]
    tensors: dict[str, str]

    @property
    def equal(self) -> bool:
        """Whether the tensors and the counters agree: the same state, whatever the layout."""
        return not self.state and not self.tensors

    def lines(self) -> list[str]:
        """One line a difference, and the outcome."""
        facts = {f"config {key}": pair for key, pair in self.config.items()}
        facts |= {f"state {key}": pair for key, pair in self.state.items()}
        lines = [f"{key}: {old} → {new}" for key, (old, new) in facts.items()]
        lines += [f"{name}: {what}" for name, what in self.tensors.items()]
        return [*lines, "equal bit for bit" if self.equal else "different"]

    def figures(self) -> dict[str, Any]:
        """The same for JSON."""
        return {"equal": self.equal, **asdict(self)}


def compare(old: Checkpoint, new: Checkpoint, weights_only: bool = False) -> Difference:
    """Read both wholly, in blocks, and compare them; `weights_only`: the weights and nothing else.

    Raises:
        CorruptError: one of them is damaged.
    """
    names = sorted(old.manifest.tensors.keys() | new.manifest.tensors.keys())
    if weights_only:
        names = [name for name in names if name.startswith(f"{MASTER}/")]
    found = {name: _tensor_difference(name, old, new) for name in names}
    tensors = {name: what for name, what in found.items() if what}
    if weights_only:
        return Difference({}, {}, tensors)
    state = _changed(old.manifest.state, new.manifest.state)
    return Difference(_changed(old.manifest.config, new.manifest.config), state, tensors)


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys of two trees, joined by dots, whose values differ."""
    mine, theirs = _flat(old), _flat(new)
    keys = [*mine, *(key for key in theirs if key not in mine)]
    return {k: (mine.get(k), theirs.get(k)) for k in keys if mine.get(k) != theirs.get(k)}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _tensor_difference(name: str, old: Checkpoint, new: Checkpoint) -> str:
    """What is the matter with a tensor; empty where it is equal in both."""
    entries = [checkpoint.manifest.tensors.get(name) for checkpoint in (old, new)]
    kinds = [f"{e.dtype} {list(e.shape)}" if e else "absent" for e in entries]
    if kinds[0] != kinds[1]:
        return " → ".join(kinds)
    regions = (
        _region_difference(name, region, old, new) for region in stored_regions(name, old, new)
    )
    unequal, gaps = zip(*regions, strict=True)
    return f"{sum(unequal):,} elements differ, by {max(gaps):.3g} at most" if any(unequal) else ""


def _region_difference(
    name: str, region: tuple[slice, ...], old: Checkpoint, new: Checkpoint
) -> tuple[int, float]:
    """How many elements differ in their bits, and by how much at most.

    So 0 and -0 differ, by nothing, and a NaN does not differ from itself.
    """
    a, b = old.read(name, region), new.read(name, region)
    a_bits, b_bits = (tensor.view(_INTEGERS[tensor.element_size()]) for tensor in (a, b))
    if torch.equal(a_bits, b_bits):
        return 0, 0.0
    gap = (a.double() - b.double()).abs().nan_to_num(torch.inf)
    return int((a_bits != b_bits).sum()), float(gap.max())
