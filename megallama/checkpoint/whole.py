"""Directories that are whole or absent, as `files` has it for files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megallama.errors import ConfigError
from megallama.files import Disk, partial_path, refuse_os_errors, sync_path

DISK = Disk()  # it has no state


@contextmanager
def whole_directory(target: Path, room: int = 0, disk: Disk = DISK) -> Iterator[Path]:
    """Yields an empty directory that takes the name `target`, synced, once the block has ended.

    Until then it has another name, which a killed command leaves and the next one deletes. `room`:
    bytes that it will take.

    Raises:
        ConfigError: `target` is there already, the disk has less room, or the system refuses.
    """
    if os.path.lexists(target):
        raise ConfigError(f"{target}: is there already; name another target or remove it")
    partial = partial_path(target)
    with refuse_os_errors("write", target):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = disk.free_bytes(partial)
    try:
        if free < room:
            raise ConfigError(
                f"cannot write {target}: it takes {room / 2**30:.2f} GiB and the disk has "
                f"{free / 2**30:.2f} GiB; free some, or name a target on another disk"
            )
        yield partial
        with refuse_os_errors("write", target):
            for path in (*partial.iterdir(), partial):
                sync_path(path)
            os.rename(partial, target)
            sync_path(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
