"""Random valid combinations of everything a case has, on random shapes, as a function of a seed."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from tests.layouts.case import LABELS, OVERLAPS, POLICIES, SCHEDULES, Case
from tests.layouts.rounding import is_steady

RANKS = 8


def draw(seed: int, number: int) -> Case:
    """The `number`-th case of the campaign with this seed.

    Some random problems magnify the rounding of fp32 until it comes near the tolerance, in the
    plain reference as well: those are run in fp64.
    """
    case = _draw(seed, number)
    return case if is_steady(case) else replace(case, precision="fp64")


def _draw(seed: int, number: int) -> Case:
    generator = random.Random(f"{seed}/{number}")
    pick = generator.choice
    # Any number of ranks, the powers of two more often than others.
    ranks = pick((2, 4, 8, generator.randint(1, RANKS), generator.randint(1, RANKS), 8))
    pipeline = pick(_divisors(ranks))
    tensor = pick(_divisors(ranks // pipeline))
    data = ranks // pipeline // tensor
    heads = tensor * generator.randint(1, max(1, 8 // tensor))
    micro_batch = pick((1, 1, 2, 3))
    sequence_parallel = pick((True, True, False))
    overlap = pick(OVERLAPS)
    splits = Case(tensor=tensor, sequence_parallel=sequence_parallel, overlap=overlap)
    unit = splits.sequence_unit
    return Case(
        tensor=tensor,
        data=data,
        **_stages(generator, pipeline),
        early=pick((False, False, True)),
        sequence_parallel=sequence_parallel,
        overlap=overlap,
        policy=pick(POLICIES),
        heads=heads,
        kv_heads=pick([k for k in _divisors(heads) if k % tensor == 0 or tensor % k == 0]),
        vocab=generator.randint(2, 90),
        tied=pick((False, True)),
        masked=pick((False, True)),
        labels=pick([kind for kind in LABELS if kind != "empty_rank" or data > 1]),
        micro_batches=pick((1, 2, 3) if pipeline == 1 else (1, 2, 3, 4, 5, 8)),
        micro_batch=micro_batch,
        precision=pick(("fp64", "fp64", "fp32")),
        late=pick((False, True)),
        wire=pick(("fp32",) * 7 + ("bf16",)),
        d_model=heads * pick([w for w in range(2, 18, 2) if 16 <= heads * w <= 64]),
        ffn=tensor * generator.randint(1, 12),
        sequence=unit * generator.randint(-(-8 // unit), max(2, 32 // unit)),
        seed=generator.randrange(1000),
    )


def _stages(generator: random.Random, pipeline: int) -> dict[str, Any]:
    """A schedule of `pipeline` ranks, also of one, and layers for its chunks."""
    pick = generator.choice
    schedule = pick(SCHEDULES)
    virtual = pick((1, 2, 3)) if "interleaved" in schedule and pipeline <= 4 else 1
    chunks = Case(pipeline=pipeline, schedule=schedule, virtual=virtual).chunks
    counts = [pick((1, 1, 2, 3)) for _ in range(chunks)] if chunks <= 4 else [1] * chunks
    counts[generator.randrange(chunks)] += pick((0, 1, 2))
    return {
        "pipeline": pipeline,
        "schedule": schedule,
        "virtual": virtual,
        "stage_layers": pick(("cost", "even", ",".join(map(str, counts)))),
        "layers": sum(counts),
    }


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
