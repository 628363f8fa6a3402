"""Saves checkpoints behind the steps: a copy in host memory holds a step up, the disk does not.

Each rank has a thread that writes one save at a time. The threads of all ranks meet in the job's
store under keys of their own, and no collective is theirs.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megallama.checkpoint.rank_file import Rectangle
from megallama.checkpoint.store import (
    DISK,
    checkpoint_path,
    committed_checkpoints,
    prune_checkpoints,
)
from megallama.data.dataset import Dataset
from megallama.errors import ConfigError, UserError
from megallama.files import Disk
from megallama.train.build import Trainer
from megallama.train.lease import Lease
from megallama.train.meeting import Meeting
from megallama.train.snapshot import Progress, Snapshot, rectangles, snapshot, write_snapshot
from megallama.train.spikes import kept_for

#: Bytes to which every copied tensor is aligned.
ALIGNMENT = 64


@dataclass(frozen=True)
class Ended:
    """How a save ended, alike on every rank: `error` where there is no checkpoint of the step.

    `warning`: of rank 0, where older checkpoints could not be deleted, or rows not be synced.
    """

    step: int
    error: UserError | None = None
    warning: str = ""


class HostCopy:
    """Host memory that one rank's rectangles are copied to, the same for every save.

    Raises ConfigError where there is no room for it.
    """

    def __init__(self, views: Sequence[Rectangle], pinned: bool) -> None:
        room = [-(-view.data.nbytes // ALIGNMENT) * ALIGNMENT for view in views]
        self.bytes = sum(room)
        try:
            memory = torch.empty(self.bytes, dtype=torch.uint8, pin_memory=pinned)
        except (RuntimeError, MemoryError) as error:  # torch's own, for a refused allocation too
            raise ConfigError(
                f"checkpoint.asynchronous: no host memory for a copy of {self.bytes / 2**30:.1f} "
                "GiB on this rank; set it to false"
            ) from error
        self._tensors = [
            piece[: view.data.nbytes].view(view.data.dtype).view(view.data.shape)
            for piece, view in zip(memory.split(room), views, strict=True)
        ]

    def take(self, views: Sequence[Rectangle]) -> list[Rectangle]:
        """The same rectangles with copies of their data; all copied when this returns."""
        for tensor, view in zip(self._tensors, views, strict=True):
            tensor.copy_(view.data, non_blocking=True)
        if views and views[0].data.is_cuda:
            torch.cuda.current_stream(views[0].data.device).synchronize()
        pairs = zip(self._tensors, views, strict=True)
        return [replace(view, data=tensor) for tensor, view in pairs]


class Saver:
    """The saves of a run, on one rank; all ranks call it alike.

    `newest`: the run's newest checkpoint as far as this rank has waited for it. `lease`: the right
    to write, of the rank that leads. A process that was stopped in a save may come back to find
    that another job does. `sync_rows`: puts the rows of the steps that a save counts on the disk.
    """

    def __init__(
        self,
        trainer: Trainer,
        dataset: Dataset,
        meeting: Meeting,
        newest: Path | None,
        lease: Lease | None = None,
        sync_rows: Callable[[], None] = lambda: None,
        disk: Disk = DISK,
    ) -> None:
        self.trainer, self.dataset, self.disk = trainer, dataset, disk
        self._sync_rows = sync_rows
        self._may_write = lease.check if lease else lambda: None
        self.folder = trainer.config.run.directory / "checkpoints"
        self.newest = newest.resolve() if newest else None
        self._meeting = Meeting(meeting.process, "save", meeting.pulse)
        config = trainer.config.checkpoint
        self._copy = None
        if config.asynchronous and config.every:
            self._copy = HostCopy(rectangles(trainer), pinned=trainer.device.type == "cuda")
        self._thread: threading.Thread | None = None
        self._ended: deque[Ended] = deque()
        self._bug: BaseException | None = None

    def start(self, progress: Progress) -> None:
        """Save this step, unless it is saved; the one before is waited for."""
        self.finish()
        if self._is_newest(progress):
            return
        state = snapshot(self.trainer, progress, self.dataset)
        if self._copy is None:
            self._ended.append(self._save(state))
            return
        state = replace(state, rectangles=self._copy.take(state.rectangles))
        # A daemon: a process that ends for another reason waits for it in the loop, not at exit.
        self._thread = threading.Thread(target=self._work, args=[state], name="save", daemon=True)
        self._thread.start()

    def save_last(self, progress: Progress) -> None:
        """Save this step, unless it is saved, and wait for it; the disk is tried once more where
        that failed before.

        Raises:
            UserError: it is not saved.
        """
        self.finish()
        if self._is_newest(progress):
            return
        ended = self._save(snapshot(self.trainer, progress, self.dataset))
        if ended.error:
            raise ended.error
        self._ended.append(ended)

    def finish(self, seconds: float | None = None) -> None:
        """Wait for the save that is under way, for so long at most."""
        if self._thread:
            self._thread.join(seconds)
        self._collect()

    def ended(self) -> list[Ended]:
        """The saves that ended since the last call, without waiting."""
        self._collect()
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def _kept(self, newest: Path) -> int:
        """How many checkpoints up to `newest` stay: also those that a spike may go back to, which
        are further back where stops have left some between."""
        config = self.trainer.config
        if config.train.spike is None:
            return config.checkpoint.keep
        finished = [path for path in committed_checkpoints(self.folder) if path <= newest]
        return max(config.checkpoint.keep, kept_for(config, finished))

    def _is_newest(self, progress: Progress) -> bool:
        return checkpoint_path(self.folder, progress.step).resolve() == self.newest

    def _collect(self) -> None:
        if self._thread and not self._thread.is_alive():
            self._thread = None
        if self._bug and not self._thread:
            bug, self._bug = self._bug, None
            raise bug

    def _work(self, state: Snapshot) -> None:
        try:
            self._ended.append(self._save(state))
        except BaseException as bug:
            self._bug = bug  # it is raised where the thread is waited for

    def _save(self, state: Snapshot) -> Ended:
        """Write, commit, and delete what is older.

        In a stretch of steps that were not finite the weights may be the reason: then nothing older
        is deleted for them.
        """
        warnings = list[str]()
        try:
            self._sync_rows()
        except UserError as error:
            warnings.append(f"{error}; a power failure may lose rows of steps that are saved")
        try:
            path = write_snapshot(state, self.folder, self._meeting, self.disk, self._may_write)
        except UserError as error:
            return Ended(state.step, error)
        self.newest = path.resolve()
        config = self.trainer.config.checkpoint
        if self._meeting.leads and not state.facts.state["failures"]:
            try:
                self._may_write()
                prune_checkpoints(self.folder, self._kept(path), path, config.keep_every, self.disk)
            except UserError as error:
                warnings.append(str(error))
        return Ended(state.step, warning="; ".join(warnings))
