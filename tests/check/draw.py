"""Random valid jobs, of one rank to 2,048, as a function of a seed."""

from __future__ import annotations

import random
from math import prod
from typing import Any

from megallama.config.load import parse_config
from megallama.config.schema import Config
from megallama.spec.schedules.build import NAMES as SCHEDULES

#: Ranks of a drawn job at most, and of every second one.
MOST, FEW = 2048, 16


def draw(seed: int, number: int) -> tuple[Config, int]:
    """The `number`-th job of a seed, and its ranks."""
    generator = random.Random(f"check/{seed}/{number}")
    pick = generator.choice
    sizes = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 64, 256)
    while True:
        tensor, pipeline, data = pick((1, 2, 2, 4, 8)), pick((1, 2, 3, 4, 8)), pick(sizes)
        if prod((tensor, pipeline, data)) <= (FEW if number % 2 else MOST):
            break
    heads = tensor * pick((1, 2, 3))
    kv_heads = [k for k in range(1, heads + 1) if heads % k == 0]
    micro_batch, micro_batches = pick((1, 1, 2)), pick((1, 2, 3, 4, 5, 8, 13))
    values: dict[str, Any] = {
        "run": {"name": "drawn"},
        "model": {
            "d_model": heads * pick((2, 4, 6, 8)),
            "heads": heads,
            "kv_heads": pick([k for k in kv_heads if k % tensor == 0 or tensor % k == 0]),
            "ffn": tensor * generator.randint(1, 12),
            "vocab": generator.randint(2, 90),
            "tie_embeddings": pick((False, True)),
        },
        "train": {
            "steps": 1,
            "sequence_length": 2 * tensor * generator.randint(1, 4),
            "global_batch": micro_batch * micro_batches * data,
            "micro_batch": micro_batch,
            "precision": pick(("bf16", "fp32", "fp64")),
            "saved_activations": pick(
                ("linear_outputs", "all", "no_attention_output", "no_gate_up", "layer_input")
            ),
            "check_replicas_every": pick((0, 1, 1, 5)),
        },
        "parallel": {
            "tensor": tensor,
            "sequence_parallel": pick((True, True, False)),
            "overlap": pick(("none", "backward", "full")),
            "gradient_wire": pick(("fp32", "fp32", "bf16")),
            "early_step": pick((False, False, True)),
        },
        "optimizer": {"lr": 1e-3, "warmup_steps": 0, "schedule": "constant"},
        "log": {"layer_norms_every": pick((0, 0, 7))},
    }
    _stages(generator, pipeline, values)
    return parse_config(values), tensor * pipeline * data


def _stages(generator: random.Random, pipeline: int, values: dict[str, Any]) -> None:
    """A schedule, and layers for its chunks."""
    pick = generator.choice
    schedule = pick(SCHEDULES)
    virtual = {"zb-v": 2}.get(schedule, pick((1, 2, 3)) if "interleaved" in schedule else 1)
    counts = [pick((1, 1, 2)) for _ in range(pipeline * virtual)]
    values["model"]["layers"] = sum(counts)
    values["parallel"] |= {
        "pipeline": pipeline,
        "schedule": schedule,
        "virtual_stages": virtual,
        "stage_layers": pick(("cost", "even", counts)),
    }
