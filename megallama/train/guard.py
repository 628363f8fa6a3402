"""What a run watches beside its numbers: damage, another writer, a stop-file, slow ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from megallama.train.build import Trainer
from megallama.train.lease import Lease
from megallama.train.meeting import Meeting
from megallama.train.replicas import Replicas
from megallama.train.signals import StopFile
from megallama.train.stragglers import Stragglers


class Guard:
    """One rank's; all ranks call it alike. `lease`: the right to write, of the rank that leads."""

    def __init__(
        self, trainer: Trainer, meeting: Meeting, lease: Lease | None, say: Callable[[str], None]
    ) -> None:
        self.config, self.meeting, self.lease = trainer.config, meeting, lease
        self.replicas = Replicas(trainer)
        self.stop_file = StopFile(self.config.run.directory)
        self.stragglers = Stragglers(trainer, meeting, self.config.log.stragglers_every, say)

    def stop_asked(self) -> bool:
        """Whether somebody made the stop-file."""
        return self.meeting.leads and self.stop_file.asked()

    def stopped(self) -> None:
        """Everything is saved: whoever starts the run again wants it to go on."""
        if self.meeting.leads:
            self.stop_file.heard()

    def alarms(self, step: int) -> tuple[bool | Tensor, bool]:
        """Of this rank, late in a step and before its update: what must keep it from being saved.

        To be agreed on by all ranks, and then handed to `heed`.
        """
        every, saves = self.config.train.check_replicas_every, self.config.checkpoint.every
        due = bool(every) and (step % every == 0 or (bool(saves) and step % saves == 0))
        damaged = self.replicas.compare() if due else False
        return damaged, self.replaced

    @property
    def replaced(self) -> bool:
        """Whether another job is known to have taken over."""
        return self.lease is not None and self.lease.replaced

    def heed(self, alarms: Sequence[bool], step: int) -> None:
        """End the run, unsaved, for what some rank is alarmed by.

        Raises:
            LostError: something that several ranks hold is damaged on one.
            ConfigError: another job writes to the run directory.
        """
        damaged, replaced = alarms
        if replaced:
            self.meeting.hold(self._check_lease)
        if damaged:
            raise self.replicas.lost(self.meeting, step)

    def _check_lease(self) -> str:
        if self.lease is not None:
            self.lease.check()
        return ""
