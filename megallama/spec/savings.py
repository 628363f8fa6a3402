"""Changes of a config that save memory, the cheapest first; the ledger says what each comes to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megallama.config.load import parse_config
from megallama.config.schema import Config
from megallama.errors import ConfigError
from megallama.spec.grid import Grid, make_grid
from megallama.spec.memory import held_bytes
from megallama.spec.workspaces import Device

#: Values of train.saved_activations from what saves most to what recomputes most: nothing but
#: SwiGLU, the norms, attention as well, W13 instead of attention, the whole layer.
LEANER = ("all", "linear_outputs", "no_attention_output", "no_gate_up", "layer_input")
#: How many times the ranks are tried.
MORE_RANKS = (2, 4, 8, 16, 32, 64)

#: Section and key → value.
Keys = Mapping[tuple[str, str], Any]


@dataclass(frozen=True)
class Change:
    """A config that differs by `text`, such as "train.micro_batch=1", and its grid."""

    text: str
    config: Config
    grid: Grid


def cheapest(
    config: Config, grid: Grid, device: Device, fits: Callable[[int], bool]
) -> tuple[Change, int] | None:
    """The first change that fits, and the bytes of the rank that then holds the most, of which
    `fits` is asked. None: no change does."""
    for change in changes(config, grid):
        size = sum(held_bytes(change.config, change.grid, device).values())
        if fits(size):
            return change, size
    return None


def changes(config: Config, grid: Grid) -> Iterator[Change]:
    """In the order of what they cost: time first, then ranks. What cannot be run is left out."""
    for keys in _keys(config, grid):
        tree = config.model_dump(mode="json")
        for (section, key), value in keys.items():
            tree[section][key] = value
        try:
            changed = parse_config(tree)
            parallel = changed.parallel
            ranks = parallel.tensor * parallel.pipeline * (parallel.data or grid.data)
            found = make_grid(changed, ranks)
        except ConfigError:
            continue
        text = " ".join(f"{section}.{key}={_yaml(value)}" for (section, key), value in keys.items())
        yield Change(text, changed, found)


def _keys(config: Config, grid: Grid) -> Iterator[Keys]:
    train, parallel = config.train, config.parallel
    if parallel.early_step:
        yield {("parallel", "early_step"): False}
    if grid.tensor > 1 and not parallel.sequence_parallel:
        yield {("parallel", "sequence_parallel"): True}
    policy = "train", "saved_activations"
    leaner = LEANER[LEANER.index(train.saved_activations) + 1 :]
    yield from ({policy: name} for name in leaner)
    # A divisor of the micro-batch still divides what a data rank has of the global batch.
    smaller = [n for n in range(train.micro_batch - 1, 0, -1) if train.micro_batch % n == 0]
    yield from ({("train", "micro_batch"): n} for n in smaller)
    for n in smaller if leaner else ():
        yield {("train", "micro_batch"): n, policy: LEANER[-1]}
    for times in MORE_RANKS:
        for axis in ("data", "tensor", "pipeline"):
            more = {("parallel", axis): times * getattr(grid, axis)}
            yield more
            if leaner:
                yield {**more, policy: LEANER[-1]}


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
