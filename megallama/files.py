"""Writing files that are either whole or absent, and reading errors as one line."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megallama.errors import ConfigError, LostError

#: What a failing disk or a file server that went away answers.
LOST = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO}


def partial_path(path: Path) -> Path:
    """The name a file has until it is whole: `corpus.bin` is written as `corpus.bin.partial`."""
    return path.with_name(path.name + ".partial")


@contextmanager
def refuse_os_errors(verb: str, path: Path) -> Iterator[None]:
    """Turns the system's refusal (no such file, disk full) into one line about `path`.

    Raises ConfigError, or LostError where the device or the network failed.
    """
    try:
        yield
    except OSError as error:
        kind = LostError if error.errno in LOST else ConfigError
        raise kind(f"cannot {verb} {path}: {error.strerror or error}") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yields a file that takes the name `path` only once the block has ended without an error.

    A link is followed, and a device or pipe is written to: neither is replaced by a file.
    Raises ConfigError where the system refuses.
    """
    path = path.resolve()
    partial = partial_path(path)
    with refuse_os_errors("write", path):
        if path.exists() and not path.is_file():
            with open(path, "wb") as file:
                yield file
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                yield file
                sync(file)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_path(path.parent)


def refuse_overwriting(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raises ConfigError where a command would write over what it reads."""
    read = {path.resolve() for path in inputs}
    for path in outputs:
        if path.resolve() in read:
            raise ConfigError(f"{path}: is read and would be written over; name another output")


def write_atomic(path: Path, content: bytes) -> None:
    """Replaces `path` by `content`: after a kill it holds the old bytes or the new ones.

    Raises ConfigError where the system refuses.
    """
    with atomic_write(path) as file:
        file.write(content)


def sync(file: BinaryIO) -> None:
    """Returns once the bytes written to `file` are on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Returns once the bytes of file `path`, or the names in directory `path`, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
