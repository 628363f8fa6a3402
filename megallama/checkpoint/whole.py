"""Directories that are whole or absent, as `files` has it for files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megallama.errors import ConfigError
from megallama.files import partial_path, refuse_os_errors, sync_path


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Yields an empty directory that takes the name `target`, synced, once the block has ended.

    Until then it has another name, which a killed command leaves and the next one deletes.

    Raises:
        ConfigError: `target` is there already, or the system refuses.
    """
    if os.path.lexists(target):
        raise ConfigError(f"{target}: is there already; name another target or remove it")
    partial = partial_path(target)
    with refuse_os_errors("write", target):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        yield partial
        with refuse_os_errors("write", target):
            for path in (*partial.iterdir(), partial):
                sync_path(path)
            os.rename(partial, target)
            sync_path(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
