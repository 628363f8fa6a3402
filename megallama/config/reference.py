"""The reference of all keys, docs/config.md, made from the schema's own words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megallama.config.schema import Config, Phase, Profile, RopeScaling, Source, Spike

HEAD = """# Configuration keys

A run is a YAML file of these sections; `section.key=value` on the command line overrides it. The
whole config is checked before anything starts, and all its faults are reported together.

This page is made from `megallama/config/schema.py`:

```
python -c 'from megallama.config import reference; print(reference.markdown())'
```
"""

#: What lists and optional parts of a section are made of.
PARTS: dict[str, Any] = {
    "an entry of `data.mixture`": Source,
    "an entry of `data.phases`": Phase,
    "`model.rope_scaling`": RopeScaling,
    "`train.profile`": Profile,
    "`train.spike`": Spike,
}


def markdown() -> str:
    """The page's text."""
    tables = [HEAD]
    for name, field in Config.model_fields.items():
        section: Any = field.annotation
        tables.append(_table(f"`{name}`", section.model_fields))
    tables += [_table(title, part.model_fields) for title, part in PARTS.items()]
    return "\n".join(tables)


def _table(title: str, fields: dict[str, FieldInfo]) -> str:
    rows = "\n".join(_rows(fields))
    return f"## {title}\n\n| key | default | meaning |\n|---|---|---|\n{rows}\n"


def _rows(fields: dict[str, FieldInfo]) -> Iterator[str]:
    for name, field in fields.items():
        words = re.sub(r"\s+", " ", field.description or "")
        meaning, _, default = words.partition(" Default: ")
        yield f"| `{name}` | {default.rstrip('.') or _default(field.default)} | {meaning} |"


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if value is None or value == ():
        return "none"
    words = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{words}`"
