"""A run's metrics.jsonl: one JSON object a line, one line a step and one a validation.

Each line is one `write`, so a killed run leaves at most a torn last line: the reader passes over it
and the writer cuts it off when it opens the file. What a checkpoint counts as done is on the disk
before the checkpoint is: a run that goes on from it writes those rows no more. JSON has no NaN: a
non-finite number is null.

Step rows hold: step tokens loss grad_norm lr step_seconds tokens_per_second
tokens_per_second_per_gpu tflops_per_gpu mfu mfu_6n memory_bytes, and where they exist
loss_per_source {name: loss}, epochs, layer_norms, skipped_steps. Validation rows hold: step tokens
validation_loss validation_loss_per_source. A save that failed has a row of its own: step tokens
failed_save {step, reason}. One that the loss-spike guard sent back has: step (the first one that is
taken again) tokens rewind {from_step, loss, median, skipped_samples [first, end)}; the rows of the
steps that were undone are gone. Losses are in nats a token.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any

from megallama.config.values import COUNT_LIMIT
from megallama.errors import CorruptError, UserError
from megallama.files import Disk, refuse_os_errors

Row = dict[str, Any]


class MetricsWriter:
    """Appends rows to `path`. One writer a file; made by one rank only.

    Raises OSError where the system refuses, and so does `write`.
    """

    def __init__(self, path: Path | str, disk: Disk | None = None) -> None:
        self.path, self._disk = Path(path), disk or Disk()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._torn_at: int | None = None
        self._fd = self._disk.open_log(self.path)
        self._mend_tail()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row. Raises OSError, with the file as it was, where the disk is full."""
        line = _encode(row)
        self._mend()
        start = self._disk.size(self._fd)
        try:
            self._disk.extend(self._fd, line)
        except OSError:
            self._torn_at = start
            self._mend()
            raise

    def sync(self) -> None:
        """Returns once all rows so far are on the disk. Raises OSError."""
        self._disk.sync_log(self._fd)

    def truncate_after(self, step: int) -> int:
        """Drop every row of a later step than `step` (a resumed run writes them again).

        The file is cut at the first of them, for which a full disk has room; a kill leaves all rows
        or those that stay. Returns the number of rows dropped. Raises OSError, and CorruptError as
        `read_metrics`.
        """
        self._mend()
        end, dropped, behind = 0, 0, list[bytes]()
        for line, row in _scan(self.path):
            if row["step"] > step:
                dropped += 1
            elif dropped:  # out of order: a job that was taken over may have left a row
                behind.append(line)
            else:
                end += len(line)
        if dropped:
            self._disk.cut(self._fd, end)
            for line in behind:
                self._disk.extend(self._fd, line)
            self.sync()  # or a power failure might bring them back among later ones
        return dropped

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _mend(self) -> None:
        """Cut the part of a row that was written; a failing disk may refuse that for a while."""
        if self._torn_at is not None:
            self._disk.cut(self._fd, self._torn_at)
            self._torn_at = None

    def _mend_tail(self) -> None:
        """Cut a torn last line; give one that lacks only its newline the newline."""
        size = end = self._disk.size(self._fd)
        tail = b""
        while end and b"\n" not in tail:
            start = max(0, end - 4096)
            tail = os.pread(self._fd, end - start, start) + tail
            end = start
        last = tail.rpartition(b"\n")[2]
        if not last:
            return
        if _parse(last) is None:
            self._disk.cut(self._fd, size - len(last))
        else:
            self._disk.extend(self._fd, b"\n")


class PatientWriter:
    """Rows that wait in memory while the disk refuses them, so that a full one ends no run.

    `say` is told once when rows begin to wait. A killed run loses those that do.
    """

    def __init__(self, writer: MetricsWriter, say: Callable[[str], None]) -> None:
        self._writer, self._say = writer, say
        self._waiting: deque[Row] = deque()
        self._refused = False

    def write(self, row: Row) -> None:
        """Append a row after those that wait, or let it wait with them."""
        self._waiting.append(row)
        error = self._try()
        if error and not self._refused:
            self._say(f"{error}; its rows wait in memory")
        self._refused = error is not None

    def take_back(self, step: int) -> None:
        """Drop every row of a later step than `step`.

        Raises:
            UserError: the file cannot be written.
        """
        self._waiting = deque(row for row in self._waiting if row["step"] <= step)
        with refuse_os_errors("write", self._writer.path):
            self._writer.truncate_after(step)

    def sync(self) -> None:
        """Returns once the rows that the disk took are on it. Any thread may ask for it.

        Raises:
            UserError: it failed, and a power failure may lose some.
        """
        with refuse_os_errors("sync", self._writer.path):
            self._writer.sync()

    def finish(self) -> None:
        """Write what waits, or say what is lost."""
        if error := self._try():
            count, first = len(self._waiting), self._waiting[0]["step"]
            self._say(f"{error}; {count} rows are lost, the first of step {first}")

    def _try(self) -> UserError | None:
        """Write what waits, in order, until the disk refuses one: that error."""
        try:
            with refuse_os_errors("write", self._writer.path):
                while self._waiting:
                    self._writer.write(self._waiting[0])
                    self._waiting.popleft()
        except UserError as error:
            return error
        return None


def read_metrics(path: Path | str) -> list[Row]:
    """The rows of metrics.jsonl in file order; a torn last line is passed over.

    Raises CorruptError where another line is not a JSON object with a whole number as its step,
    OSError where the file cannot be read.
    """
    return [row for _, row in _scan(Path(path))]


def _encode(row: Mapping[str, Any]) -> bytes:
    text = json.dumps(_finite(row), allow_nan=False, separators=(", ", ": "))
    return text.encode() + b"\n"


def _finite(value: Any) -> Any:
    """`value` as JSON can hold it: numbers of any library as Python's, null where not finite."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    raise TypeError(f"a metric is a number, a text, a list or a dict, not {type(value).__name__}")


def _scan(path: Path) -> Iterator[tuple[bytes, Row]]:
    """Each line with its row; the last line may be torn or lack its newline."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            row = _parse(line)
            if row is not None:
                yield line if line.endswith(b"\n") else line + b"\n", row
            elif line.endswith(b"\n"):
                raise CorruptError(
                    f"{path}, line {number} is not a JSON object with a whole number as its step: "
                    "delete that line to go on"
                )


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return row if type(step) is int and 0 <= step < COUNT_LIMIT else None
