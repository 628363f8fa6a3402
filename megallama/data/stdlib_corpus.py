"""A corpus that is on every machine: the sources of the running Python's standard library."""

from __future__ import annotations

import json
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from megallama.errors import ConfigError
from megallama.files import atomic_write

# Tests, tables of code points and generated text, other people's packages. (What records the
# build's own paths is left out by name: the corpus should not depend on where Python lies.)
LEFT_OUT = {
    *("test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"),
    *("_bundled", "site-packages", "dist-packages", "__pycache__"),
}
LEAST_FILES = 100


def stdlib_sources(root: Path) -> Iterator[Path]:
    """Yields the library's .py files under `root`, sorted by path."""
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        built = path.name.startswith(("_sysconfigdata", "python-config"))
        if not built and not LEFT_OUT.intersection(inside.parts):
            yield path


def write_stdlib_corpus(out: Path, root: Path | None = None) -> tuple[int, int]:
    """Writes one JSON object `{"text": source}` a file; returns the files and characters written.

    root: where the sources lie; None: the running interpreter's. Raises ConfigError where the
    interpreter came without them.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    sources = list(stdlib_sources(root))
    if len(sources) < LEAST_FILES:
        raise ConfigError(
            f"{root}: only {len(sources)} Python sources: this Python came without its standard "
            "library's sources; install them, or use another Python"
        )
    characters = 0
    with atomic_write(out) as file:
        for path in sources:
            with tokenize.open(path) as source:
                text = source.read()
            file.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
            characters += len(text)
    return len(sources), characters
