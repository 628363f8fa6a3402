"""Writing files that are either whole or absent, and reading errors as one line."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megallama.errors import ConfigError, CorruptError, LostError

#: What a failing disk or a file server that went away answers.
LOST = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO}
#: Bytes of one call to write: Linux writes 2 GiB at most.
WRITE_BYTES = 64 << 20


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


def open_plain(path: Path, verb: str = "read") -> BinaryIO:
    """An existing file, open for reading. Links are followed; no pipe is waited for.

    `verb`: of the message where the system refuses.

    Raises ConfigError, or LostError where the device or the network failed.
    """
    with refuse_os_errors(verb, path):
        file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115
        try:
            refuse_other_kinds(file.fileno())
        except OSError:
            file.close()
            raise
    return file


@contextmanager
def plain_file(path: Path, verb: str = "read") -> Iterator[BinaryIO]:
    """`open_plain` that closes the file, and turns what the system refuses meanwhile into one line.

    Raises as `open_plain`.
    """
    with refuse_os_errors(verb, path), open_plain(path, verb) as file:
        yield file


def read_plain(path: Path, most: int, verb: str = "read") -> bytes:
    """A whole file of at most `most` bytes.

    Raises as `open_plain`, and CorruptError for a larger one.
    """
    with plain_file(path, verb) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise CorruptError(f"{path}: {size:,} bytes, and such a file has {most:,} at most")
        return file.read(size)  # a count of its own: `read` takes memory for what it is asked for


def read_at(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill the buffer from `offset` of a file on; returns how many bytes there were."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not count:
            break
        done += count
    return done


def refuse_other_kinds(descriptor: int) -> None:
    """Raises OSError for a directory, a pipe, a device."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, "not a plain file")


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


class Disk:
    """All that a checkpoint and a run's log ask of the file system, one method an operation.

    It is an argument wherever they are written or read, so that tests can hand in one that fails at
    a given operation, or that forgets what was not synced. Every method raises OSError where the
    system refuses.
    """

    def make(self, directory: Path) -> None:
        """Make a directory and the parents it lacks; all their names are on the disk then."""
        if not directory.is_dir():
            self.make(directory.parent)
            try:
                self.mkdir(directory)
            except FileExistsError:
                if not directory.is_dir():  # else another process was first
                    raise
            self.sync_names(directory.parent)

    def write_new(self, path: Path, chunks: Iterable[bytes | memoryview]) -> None:
        """Write a file that is not there yet. Its bytes are on the disk then, its name may not be.

        A file of which a sync failed must be given up: the system drops the pages it could not
        write, and the next sync says that all is well.
        """
        descriptor = self.create(path)
        try:
            for chunk in chunks:
                view = memoryview(chunk)
                for start in range(0, len(view), WRITE_BYTES):
                    self.append(descriptor, view[start : start + WRITE_BYTES])
            self.sync(descriptor)
        finally:
            self.close(descriptor)

    def mkdir(self, directory: Path) -> None:
        os.mkdir(directory)

    def create(self, path: Path) -> int:
        """A descriptor of a new, empty file."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def append(self, descriptor: int, data: memoryview) -> None:
        while data:
            data = data[os.write(descriptor, data) :]

    def open_log(self, path: Path) -> int:
        """A descriptor that reads a file and adds to its end; it is made where there is none."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def extend(self, descriptor: int, line: bytes) -> None:
        """Add to the end of a log, in one write: a kill leaves it out, or a part of the last line.

        After an error a part of it may be there, too.
        """
        if os.write(descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync_log(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def cut(self, descriptor: int, size: int) -> None:
        """Leave the first bytes of a file. A full disk has room for that."""
        os.ftruncate(descriptor, size)

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def sync_names(self, directory: Path) -> None:
        """Returns once the names in a directory are on the disk."""
        sync_path(directory)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def rmdir(self, directory: Path) -> None:
        os.rmdir(directory)

    def free_bytes(self, directory: Path) -> int:
        """What this user may still write there. A quota is not seen."""
        room = os.statvfs(directory)
        return room.f_bavail * room.f_frsize

    @contextmanager
    def reading(self, path: Path) -> Iterator[int]:
        """A descriptor of an existing plain file. No link is followed, no pipe is waited for.

        Files are read, never mapped: one that is cut meanwhile ends a read early, where a mapping
        would end the process by SIGBUS.
        """
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags)
        try:
            refuse_other_kinds(descriptor)
            yield descriptor
        finally:
            os.close(descriptor)

    def size(self, descriptor: int) -> int:
        return os.fstat(descriptor).st_size

    def read_into(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        """Fill the buffer from `offset` on; returns how many bytes there were."""
        return read_at(descriptor, buffer, offset)

    def forget(self, descriptor: int) -> None:
        """Ask that synced bytes leave memory, so that reading them reads the disk."""
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
