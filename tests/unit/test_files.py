"""Files are whole or absent; what is not a file stays what it is."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from megallama.errors import ConfigError, LostError
from megallama.files import atomic_write, refuse_os_errors, refuse_overwriting, write_atomic


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomic(path, b"old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:
        file.write(b"new" * (1 // 0))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    link, target = tmp_path / "link", tmp_path / "target"
    link.symlink_to(target)
    write_atomic(link, b"x")
    assert link.is_symlink()
    assert target.read_bytes() == b"x"


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    taken: list[bytes] = []
    reader = threading.Thread(target=lambda: taken.append(pipe.read_bytes()))
    reader.start()
    write_atomic(pipe, b"x")
    reader.join()
    assert taken == [b"x"]
    assert pipe.is_fifo()


@pytest.mark.parametrize("code, kind", [(errno.ENOSPC, ConfigError), (errno.EIO, LostError)])
def test_what_may_come_back_is_told_from_what_will_not(code: int, kind: type[Exception]) -> None:
    with (
        pytest.raises(kind, match="cannot read a"),
        refuse_os_errors("read", Path("a")),
    ):
        raise OSError(code, os.strerror(code))


def test_an_input_is_not_written_over(tmp_path: Path) -> None:
    corpus = tmp_path / "a.txt"
    corpus.write_text("x")
    refuse_overwriting([tmp_path / "b"], [corpus])
    with pytest.raises(ConfigError, match="name another output"):
        refuse_overwriting([tmp_path / "." / "a.txt"], [corpus])
