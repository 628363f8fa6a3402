"""What `megallama doctor` found, and the packages, which are looked at before any is imported."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

#: `note`: training works without, perhaps slower; `broken`: it does not.
Level = Literal["ok", "note", "broken"]
REQUIRED = ("torch", "numpy", "sentencepiece", "safetensors", "pydantic", "PyYAML", "xxhash")
#: Module → the package, and what it is for.
OPTIONAL = {
    "flash_attn": "flash-attn: attention kernels for CUDA (PyTorch's own are used instead)",
    "amp_C": "apex: fused AdamW for CUDA (PyTorch's own is used instead)",
    "wandb": "wandb: experiment tracking (metrics.jsonl is always written)",
    "pyarrow": "pyarrow: parquet input for `megallama data build`",
}
#: Versions of torch that are tested: from the first to before the last.
TORCH = ((2, 11), (2, 14))


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `remedy`: what to do, where it is not as it should be."""

    subject: str
    found: str
    level: Level = "ok"
    remedy: str = ""

    def __str__(self) -> str:
        """One line."""
        mark = "" if self.level == "ok" else f"{self.level}: "
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{mark}{self.subject}: {self.found}{remedy}"


def packages() -> Iterator[Finding]:
    """Python and what training imports, without importing it."""
    yield Finding("python", platform.python_version())
    for name in REQUIRED:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "not installed", "broken", f"pip install {name}")
            continue
        first, last = TORCH
        if name == "torch" and not first <= _numbers(version) < last:
            tested = f"{first[0]}.{first[1]} to {last[0]}.{last[1] - 1}"
            yield Finding(name, f"{version}, not tested", "note", f"install one of {tested}")
        else:
            yield Finding(name, version)
    for module, purpose in OPTIONAL.items():
        name, _, use = purpose.partition(": ")
        found = "found" if importlib.util.find_spec(module) else "not found"
        yield Finding(name, f"{found}: {use}")


def _numbers(version: str) -> tuple[int, int]:
    """(2, 13) of 2.13.0+cpu."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
