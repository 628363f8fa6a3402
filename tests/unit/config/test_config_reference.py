"""docs/config.md is what the schema says, and says something of every key."""

from __future__ import annotations

from pathlib import Path

from megallama.config import reference
from megallama.config.schema import Config

PAGE = Path(__file__).parents[3] / "docs" / "config.md"


def test_page_is_the_schema() -> None:
    assert PAGE.read_text() == reference.markdown() + "\n"


def test_every_key_has_a_meaning() -> None:
    for line in reference.markdown().splitlines():
        if line.startswith("| `"):
            assert len(line.split("|")[3].strip()) > 10, line


def test_every_section_is_there() -> None:
    assert all(f"## `{section}`" in reference.markdown() for section in Config.model_fields)
