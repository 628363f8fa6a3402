"""metrics.jsonl survives kills at any byte, resumes and non-finite numbers."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megallama.errors import ConfigError, CorruptError, LostError, UserError
from megallama.train.metrics import MetricsWriter, PatientWriter, read_metrics
from tests.chaos.disks import refusing


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "demo" / "metrics.jsonl"


def write_steps(path: Path, steps: range) -> None:
    with MetricsWriter(path) as writer:
        for step in steps:
            writer.write({"step": step, "loss": 1.5 / step})


def test_rows_come_back_as_written(path: Path) -> None:
    rows = [
        {"step": 1, "loss": 2.25, "mfu": None, "loss_per_source": {"web": 2.0, "code": 2.5}},
        {"step": 1, "validation_loss": 2.5},
    ]
    with MetricsWriter(path) as writer:
        for row in rows:
            writer.write(row)
    assert read_metrics(path) == rows


def test_a_second_writer_appends(path: Path) -> None:
    write_steps(path, range(1, 3))
    write_steps(path, range(3, 5))
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]


def test_each_row_is_one_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []
    real = os.write

    def spy(fd: int, data: bytes) -> int:
        writes.append(data)
        return real(fd, data)

    with MetricsWriter(path) as writer:
        monkeypatch.setattr(os, "write", spy)
        writer.write({"step": 1, "loss": 2.0})
        writer.write({"step": 2, "loss": 1.0})
    assert [json.loads(data)["step"] for data in writes] == [1, 2]
    assert all(data.endswith(b"\n") and data.count(b"\n") == 1 for data in writes)


def test_non_finite_numbers_become_null(path: Path) -> None:
    with MetricsWriter(path) as writer:
        writer.write(
            {
                "step": 1,
                "loss": math.nan,
                "grad_norm": np.float32("inf"),
                "lr": -math.inf,
                "loss_per_source": {"web": math.nan, "code": 1.0},
                "layer_norms": [1.0, math.inf],
            }
        )

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads(path.read_text(), parse_constant=refuse)
    assert row == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "lr": None,
        "loss_per_source": {"web": None, "code": 1.0},
        "layer_norms": [1.0, None],
    }


def test_numbers_of_numpy_are_numbers(path: Path) -> None:
    with MetricsWriter(path) as writer:
        writer.write({"step": np.int64(7), "loss": np.float32(0.5)})
    assert read_metrics(path) == [{"step": 7, "loss": 0.5}]


def test_what_is_no_metric_is_refused_and_leaves_the_file_whole(path: Path) -> None:
    with MetricsWriter(path) as writer:
        writer.write({"step": 1})
        with pytest.raises(TypeError, match="object"):
            writer.write({"step": 2, "loss": object()})
    assert read_metrics(path) == [{"step": 1}]


def test_a_line_torn_at_any_byte_is_read_past_and_cut_on_opening(path: Path) -> None:
    write_steps(path, range(1, 4))
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(whole)):
        path.write_bytes(whole[:end])
        complete = end == len(whole) - 1  # all but the newline: nothing was lost
        expected = [1, 2, 3] if complete else [1, 2]
        assert [row["step"] for row in read_metrics(path)] == expected
        write_steps(path, range(4, 5))
        assert [row["step"] for row in read_metrics(path)] == [*expected, 4]
        assert path.read_bytes().count(b"\n") == len(expected) + 1


def test_a_long_torn_tail_is_cut(path: Path) -> None:
    write_steps(path, range(1, 2))
    with open(path, "ab") as file:
        file.write(b'{"step": 2, "layer_norms": [' + b"1.0, " * 4000)
    MetricsWriter(path).close()
    assert path.read_bytes().endswith(b"}\n")
    assert [row["step"] for row in read_metrics(path)] == [1]


def test_a_file_that_is_one_torn_line_becomes_empty(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\0" * 5000)  # what a power failure may leave
    MetricsWriter(path).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "bad",
    [
        b'{"step": 2, "lo\n',
        b"[1, 2]\n",
        b"\xff\xfe\n",
        b'{"loss": 1.0}\n',
        b'{"step": null}\n',
        b'{"step": "a"}\n',
        b'{"step": 2.0}\n',
        b'{"step": true}\n',
        b'{"step": -1}\n',
        b'{"step": 1' + b"0" * 30 + b"}\n",
        b"[" * 100_000 + b"\n",
    ],
)
def test_damage_before_the_end_names_file_and_line(path: Path, bad: bytes) -> None:
    write_steps(path, range(1, 2))
    with open(path, "ab") as file:
        file.write(bad + b'{"step": 3}\n')
    with pytest.raises(CorruptError, match=r"metrics\.jsonl, line 2 "):
        read_metrics(path)


def test_truncate_after_drops_later_steps_and_validations(path: Path) -> None:
    with MetricsWriter(path) as writer:
        for step in range(1, 7):
            writer.write({"step": step, "loss": 1.0})
            if step % 2 == 0:
                writer.write({"step": step, "validation_loss": 1.0})
        before = path.read_bytes().splitlines(keepends=True)
        assert writer.truncate_after(4) == 3
        assert path.read_bytes() == b"".join(before[:6])
        writer.write({"step": 5, "loss": 2.0})
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2, 2, 3, 4, 4, 5]
    assert rows[-1]["loss"] == 2.0
    assert os.listdir(path.parent) == ["metrics.jsonl"]


def test_truncate_after_the_last_step_leaves_the_file_alone(path: Path) -> None:
    write_steps(path, range(1, 4))
    inode = path.stat().st_ino
    with MetricsWriter(path) as writer:
        assert writer.truncate_after(3) == 0
    assert path.stat().st_ino == inode


def test_a_short_write_is_undone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    with MetricsWriter(path) as writer:
        writer.write({"step": 1})
        monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:5]))
        with pytest.raises(OSError) as caught:
            writer.write({"step": 2})
        monkeypatch.undo()
        writer.write({"step": 3})
    assert caught.value.errno == errno.ENOSPC
    assert [row["step"] for row in read_metrics(path)] == [1, 3]


def test_rows_out_of_order_stay_as_far_as_they_are_not_later(path: Path) -> None:
    with MetricsWriter(path) as writer:
        for step in (1, 5, 2, 6, 3, 4):
            writer.write({"step": step})
        assert writer.truncate_after(3) == 3
        writer.write({"step": 4, "again": True})
    assert read_metrics(path) == [*({"step": n} for n in (1, 2, 3)), {"step": 4, "again": True}]


@pytest.mark.parametrize("code, kind", [(errno.EIO, LostError), (errno.EDQUOT, ConfigError)])
def test_a_truncation_that_fails_leaves_every_row(
    path: Path, code: int, kind: type[UserError]
) -> None:
    write_steps(path, range(1, 4))
    with MetricsWriter(path, refusing("cut", 1, code)) as writer:
        with pytest.raises(kind) as caught:
            PatientWriter(writer, lambda text: None).take_back(1)
        writer.write({"step": 4})
    assert str(caught.value) == f"cannot write {path}: {os.strerror(code)}"
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]


def test_a_full_disk_refuses_no_truncation(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row is written, and no file made, to drop others."""
    write_steps(path, range(1, 4))
    with MetricsWriter(path) as writer:
        for name in ("write", "open", "replace", "mkdir"):
            monkeypatch.delattr(os, name)
        assert writer.truncate_after(2) == 1
        monkeypatch.undo()
        writer.write({"step": 3, "again": True})
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
    assert read_metrics(path)[2] == {"step": 3, "again": True}


def test_rows_are_taken_back_behind_one_that_a_full_disk_tore(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch)
    with MetricsWriter(path) as writer:
        rows = PatientWriter(writer, lambda text: None)
        for step in (1, 2, 3):
            disk.room = 5 if step == 3 else None
            rows.write({"step": step})
        disk.room = None
        rows.take_back(1)
        rows.write({"step": 2, "again": True})
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "again": True}]


def test_a_killed_writer_leaves_whole_lines(path: Path) -> None:
    code = (
        "import sys\n"
        "from megallama.train.metrics import MetricsWriter\n"
        "writer = MetricsWriter(sys.argv[1])\n"
        "for step in range(10**9):\n"
        "    writer.write({'step': step, 'layer_norms': [1.0] * 50})\n"
        "    if step == 200: print('going', flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.kill()
    rows = read_metrics(path)
    assert len(rows) > 200
    assert [row["step"] for row in rows] == list(range(len(rows)))


class FullDisk:
    """A disk that takes whole rows again, or a few bytes of one, or nothing."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        self._write, self._cut = os.write, os.ftruncate
        patch.setattr(os, "write", self.write)
        patch.setattr(os, "ftruncate", self.cut)

    def write(self, fd: int, data: bytes) -> int:
        if self.room is None or fd < 3:
            return self._write(fd, data)
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._write(fd, data[: self.room])

    def cut(self, fd: int, size: int) -> None:
        if self.room:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._cut(fd, size)


@pytest.mark.parametrize("room", [0, 5])
def test_rows_wait_for_a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Also where what a row left there cannot be cut off at once."""
    disk, said = FullDisk(monkeypatch), list[str]()
    with MetricsWriter(path) as writer:
        rows = PatientWriter(writer, said.append)
        for step in range(1, 9):
            disk.room = room if step in (2, 3, 4, 6) else None
            rows.write({"step": step})
        rows.finish()
    assert [row["step"] for row in read_metrics(path)] == list(range(1, 9))
    assert len(said) == 2, "once each time that the disk is full"
    assert all(s.startswith(f"cannot write {path}: ") and "rows wait" in s for s in said)


def test_of_the_rows_that_wait_those_of_later_steps_are_taken_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch)
    with MetricsWriter(path) as writer:
        rows = PatientWriter(writer, lambda text: None)
        for step in (1, 2, 3, 4):
            disk.room = None if step == 1 else 0
            rows.write({"step": step})
        rows.take_back(2)
        disk.room = None
        rows.write({"step": 3, "again": True})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_rows_that_waited_in_vain_are_counted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, said = FullDisk(monkeypatch), list[str]()
    with MetricsWriter(path) as writer:
        rows = PatientWriter(writer, said.append)
        disk.room = 0
        rows.write({"step": 7})
        rows.write({"step": 8})
        rows.finish()
    assert len(said) == 2
    assert said[1].endswith("No space left on device; 2 rows are lost, the first of step 7")
