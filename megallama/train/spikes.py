"""The loss-spike guard: where the loss jumps, the run goes back to a checkpoint, and the samples
from there to the jump are skipped.

That is PaLM's remedy (arXiv 2204.02311, section 5.1), done by rule. A step is judged by its loss,
which all ranks agree on, and by those of the updates before it, which every checkpoint has. So a
run that is stopped or killed anywhere, while it goes back too, comes to the same steps over the
same samples: what was not saved yet is done and judged again. Losses of another layout differ in
their last digits, and a loss that far from the bound may there be judged otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from megallama.checkpoint.folder import checkpoint_directories
from megallama.checkpoint.store import committed_checkpoints, delete_checkpoint
from megallama.config.schema import Config
from megallama.data.dataset import Dataset
from megallama.errors import ConfigError, DivergedError
from megallama.files import Disk, refuse_os_errors
from megallama.train.build import Trainer
from megallama.train.lease import Lease
from megallama.train.meeting import Meeting
from megallama.train.resume import begin
from megallama.train.snapshot import Progress
from megallama.train.tally import StepResult


class Spikes:
    """One rank's; all ranks call it alike. `lease`: the right to write, of the rank that leads."""

    def __init__(
        self,
        trainer: Trainer,
        dataset: Dataset,
        meeting: Meeting,
        disk: Disk,
        say: Callable[[str], None],
        lease: Lease | None = None,
    ) -> None:
        self.trainer, self.dataset, self.meeting = trainer, dataset, meeting
        self.lease = lease
        self.disk, self._say = disk, say
        self.config: Config = trainer.config
        self.rule = trainer.config.train.spike
        self.folder = trainer.config.run.directory / "checkpoints"

    def usual(self, progress: Progress, result: StepResult) -> float | None:
        """The median that this step's loss is too far above; None where it is not."""
        if self.rule is None or not result.applied or len(progress.losses) < self.rule.window:
            return None
        usual = median(progress.losses)
        return usual if result.loss > self.rule.factor * usual else None

    def note(self, progress: Progress, result: StepResult) -> None:
        """A step was taken: its loss is one that later ones are judged by."""
        if self.rule is not None and result.applied:
            progress.losses = [*progress.losses, result.loss][-self.rule.window :]

    def go_back(self, progress: Progress, words: str) -> tuple[Path, Progress] | None:
        """Fill the trainer from the newest checkpoint that is far enough back from the step after
        `progress`: that one, and the progress from there on. No later checkpoint is left then.

        None where the run has none yet: it goes on. `words` say what happened.

        Raises:
            DivergedError: the run went back as often as it may.
            ConfigError: without the samples that are skipped the data end before the run.
        """
        assert self.rule is not None
        if not (paths := self._candidates(progress.step + 1)):
            self._say(f"{words}; there is no checkpoint to go back to yet, so it goes on")
            return None
        if progress.rewinds == self.rule.most:
            raise DivergedError(
                f"{words}, and it went back train.spike.most={self.rule.most} times before; lower "
                "optimizer.lr, or raise train.spike.most or factor with --allow train.spike"
            )
        self._say(f"{words}; going back")
        path, restored = begin(self.trainer, paths, self.dataset, self.meeting, self._say)
        assert path is not None
        end = progress.samples + self.config.train.global_batch
        self._refuse_short_data(end, restored.step)
        restored.skips = joined(restored.skips, [restored.samples, end])
        restored.samples, restored.rewinds = end, progress.rewinds + 1
        self.meeting.hold(lambda: self._abandon(path))
        return path, restored

    def _candidates(self, step: int) -> list[Path]:
        """The checkpoints to go back to from `step`: rank 0 looks, the others take its word."""

        def find() -> str:
            found = committed_checkpoints(self.folder) if self.meeting.leads else []
            return json.dumps([str(path) for path in targets(self.config, found, step)])

        return [Path(path) for path in json.loads(self.meeting.hold(find))]

    def _refuse_short_data(self, samples: int, step: int) -> None:
        train, end = self.config.train, self.dataset.order.end
        needed = samples + (train.total_steps - step) * train.global_batch
        if end is not None and end < needed:
            length = train.sequence_length
            raise ConfigError(
                f"data.phases: the last one's until_tokens ends them at {end * length:,} tokens, "
                f"but with the samples that train.spike skips the run takes {needed * length:,}; "
                "raise it, or leave it out"
            )

    def _abandon(self, path: Path) -> str:
        """Delete what is later than `path`. Until then a run that is killed goes on from one that
        leads to the same spike; left there, one would be resumed after the run has gone back."""
        if self.lease is not None:
            self.lease.check()
        if self.meeting.leads:
            with refuse_os_errors("delete later checkpoints in", self.folder):
                for directory in checkpoint_directories(self.folder):
                    if directory > path:
                        delete_checkpoint(directory, self.disk)
        return ""


def regular(config: Config, finished: Sequence[Path]) -> list[Path]:
    """Of the finished checkpoints, those that a spike may go back to, oldest first: of the newest
    that are due, as many as are kept. A run that was stopped now and then has the same ones."""
    every = config.checkpoint.every
    due = [path for path in finished if _step(path) % every == 0]
    return due[-config.checkpoint.keep :]


def targets(config: Config, finished: Sequence[Path], step: int) -> list[Path]:
    """The checkpoints to go back to from `step`, the best first: the newest that is far enough
    back, or else the oldest, for a run that has just gone back may have no more. What lies ahead
    was damaged when the run began again behind it, and takes no place."""
    assert config.train.spike is not None
    found = regular(config, [path for path in finished if _step(path) < step])
    far = [path for path in found if _step(path) <= step - config.train.spike.rewind]
    return far[::-1] or found


def kept_for(config: Config, finished: Sequence[Path]) -> int:
    """How many of the newest finished checkpoints a spike may need."""
    found = regular(config, finished)
    return sum(path >= found[0] for path in finished) if found else len(finished)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def joined(ranges: Sequence[Sequence[int]], last: Sequence[int]) -> list[list[int]]:
    """Ranges in order, and one more; it continues the last of them if it begins where that ends."""
    before = [list(one) for one in ranges]
    if before and before[-1][1] == last[0]:
        return [*before[:-1], [before[-1][0], last[1]]]
    return [*before, list(last)]
