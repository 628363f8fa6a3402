"""Configs and machines of the planner's tests."""

from __future__ import annotations

from typing import Any

from megallama.config.load import parse_config
from megallama.config.schema import Config
from megallama.plan.hardware import Hardware, load_hardware

A100 = load_hardware("a100-80gb")


def changed(machine: Hardware, times: dict[str, float]) -> Hardware:
    """With constants, named as `node.bandwidth`, that many times as large."""
    tree: dict[str, Any] = machine.model_dump()
    for path, factor in times.items():
        *above, last = path.split(".")
        node = tree
        for key in above:
            node = node[key]
        node[last] *= factor
    return Hardware.model_validate(tree)


def config(preset: str = "llama-7b", **values: Any) -> Config:
    """`section__key=value`; 64 sequences of 2048 a step."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"preset": preset},
        "train": {"steps": 1, "sequence_length": 2048, "global_batch": 64},
        "parallel": {},
        "optimizer": {"lr": 1e-4},
    }
    for name, value in values.items():
        section, key = name.split("__")
        sections[section][key] = value
    return parse_config(sections)
