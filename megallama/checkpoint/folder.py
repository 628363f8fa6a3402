"""The checkpoints of a run, as the folder that they are in lists them.

Imports no torch: who decides what a job does next waits for it.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from megallama.checkpoint.manifest import MANIFEST
from megallama.files import refuse_os_errors

NAME = re.compile(r"step-[0-9]{8}")


class Saved(NamedTuple):
    """When the checkpoint that was written last was written, in ns since 1970, and its name."""

    time: int = 0
    name: str = ""


NOTHING = Saved()


def checkpoint_path(folder: Path, step: int) -> Path:
    """The directory of the checkpoint after `step`."""
    return folder / f"step-{step:08d}"


def checkpoint_directories(folder: Path) -> list[Path]:
    """Directories with the name of a checkpoint, finished or not, oldest first; none where there is
    no folder.

    Raises ConfigError, or LostError, where the system does not list them: a run that took them for
    none would begin anew.
    """
    with refuse_os_errors("list", folder):
        try:
            names = os.listdir(folder)
        except FileNotFoundError:
            return []
    return [folder / name for name in sorted(names) if NAME.fullmatch(name)]


def committed_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first. Raises as `checkpoint_directories`."""
    found = checkpoint_directories(folder)
    with refuse_os_errors("list", folder):
        return [path for path in found if (path / MANIFEST).exists()]


def last_written(folder: Path) -> Saved:
    """The checkpoint that was written last. Its name tells nothing of that: behind a damaged one a
    run saves smaller steps, and a spike deletes some. Raises as `checkpoint_directories`."""
    last = NOTHING
    for path in committed_checkpoints(folder):
        with refuse_os_errors("read", path), suppress(FileNotFoundError):  # deleted just now
            last = max(last, Saved((path / MANIFEST).stat().st_mtime_ns, path.name))
    return last
