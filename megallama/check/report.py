"""A check as text and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from megallama.check.job import Checked, Kind
from megallama.config.schema import Config
from megallama.spec.grid import Grid
from megallama.spec.groups import run_schedule
from megallama.spec.stages import chunks_of, owners_of

#: The step whose bytes are reported: weights of the step before are on their way.
STEP = "step 2"
GIB = 1 << 30


def lines(config: Config, grid: Grid, checked: Checked) -> list[str]:
    """What was found, for a terminal."""
    micro_batches = run_schedule(config, grid).micro_batches
    found = [
        f"{config.run.name} on {grid.size} ranks: tensor {grid.tensor} x data {grid.data} x "
        f"pipeline {grid.pipeline}, {config.parallel.schedule}, {micro_batches} micro-batches"
    ]
    stages: dict[int, list[Kind]] = {}
    for kind in checked.kinds:
        stages.setdefault(kind.rehearsal.place.along("pipeline"), []).append(kind)
    found.append("a step of the rank that sends most and of the one that holds most, by stage:")
    for stage, kinds in stages.items():
        most = max(kinds, key=lambda kind: sum(_sent(kind).values()))
        sent = ", ".join(f"{name} {_gib(size)}" for name, size in _sent(most).items())
        held = max(sum(kind.ledger.values()) for kind in kinds)
        layers = _layers(config, grid, stage)
        found.append(f"  pp {stage} ({layers}): sends {sent or 'nothing'}; holds {_gib(held)}")
    if checked.fault is not None:
        return [*found, f"fault ({checked.fault.kind}): {checked.fault.text}"]
    found.append(
        f"all match: {checked.operations:,} operations of {checked.steps} steps in "
        f"{checked.groups:,} groups; nobody waits for ever ({len(checked.kinds)} kinds of ranks)"
    )
    return found


def as_json(config: Config, grid: Grid, checked: Checked) -> str:
    """The same for scripts; bytes are those of one step and one rank."""
    fault = checked.fault
    document = {
        "ok": fault is None,
        "ranks": grid.size,
        "parallel": {axis: getattr(grid, axis) for axis in ("tensor", "data", "pipeline")},
        "schedule": config.parallel.schedule,
        "groups": checked.groups,
        "operations": checked.operations,
        "fault": None if fault is None else vars(fault),
        "kinds": [_kind(kind) for kind in checked.kinds],
    }
    return json.dumps(document, indent=2)


def _kind(kind: Kind) -> dict[str, Any]:
    coordinates = kind.rehearsal.place.grid.coordinates(kind.ranks[0])
    return {
        "rank": kind.ranks[0],
        "ranks": len(kind.ranks),
        "place": {axis: coordinates[axis] for axis in ("tensor", "data", "pipeline")},
        "sent_bytes": _sent(kind),
        "operations": {
            f"{group}: {operation}": count.calls
            for (group, operation), count in sorted(kind.rehearsal.sent(STEP).items())
        },
        "memory_bytes": sum(kind.ledger.values()),
        "memory": kind.ledger,
        "counted": dict(kind.rehearsal.bytes_held),
    }


def _sent(kind: Kind) -> dict[str, int]:
    """Bytes by group."""
    sent: Counter[str] = Counter()
    for (group, _), count in sorted(kind.rehearsal.sent(STEP).items()):
        sent[group] += count.bytes
    return dict(sent)


def _layers(config: Config, grid: Grid, stage: int) -> str:
    """The layers of a pipeline rank, as ranges."""
    chunks = zip(chunks_of(config, grid), owners_of(config, grid), strict=True)
    runs = [chunk.layers for chunk, owner in chunks if owner == stage]
    return "layers " + ", ".join(f"{run[0]} to {run[-1]}" for run in runs)


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 100 else f"{size / (1 << 20):,.2f} MiB"
