"""The names of the pipeline schedules, and the chunks of layers that each has on a rank."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

#: Name → the virtual stages it takes; None: any number, 1 being the form that is not interleaved.
VIRTUAL_STAGES: Mapping[str, int | None] = MappingProxyType(
    {
        "gpipe": 1,
        "1f1b": 1,
        "interleaved": None,
        "zb-h1": 1,
        "zb-h2": 1,
        "zb-v": 2,
        "1f1b-fused": 1,
        "interleaved-fused": None,
    }
)


def default_virtual_stages(name: str) -> int:
    """The number of virtual stages where none is asked for."""
    return VIRTUAL_STAGES[name] or 2
