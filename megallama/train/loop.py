"""The training loop. Nothing in this file knows that the model is a LLaMA."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from megallama.config.schema import Config
from megallama.data.dataset import Batch, Dataset
from megallama.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    CorruptError,
    DivergedError,
    LostError,
)
from megallama.files import refuse_os_errors
from megallama.optim.schedule import learning_rate
from megallama.train.build import Trainer
from megallama.train.console import Console
from megallama.train.guard import Guard
from megallama.train.lease import Lease
from megallama.train.meeting import Meeting
from megallama.train.metrics import MetricsWriter, PatientWriter
from megallama.train.profile import Profile
from megallama.train.rows import step_row
from megallama.train.saver import Saver
from megallama.train.signals import StopSignals
from megallama.train.snapshot import Progress
from megallama.train.spikes import Spikes
from megallama.train.tally import StepResult
from megallama.train.trackers import Tracker, wandb_tracker
from megallama.train.validate import validate

#: Steps in a row that may be left out for a non-finite value before the run is given up.
MOST_FAILURES = 10
#: Seconds that a failing rank gives to the checkpoint that is being written; and where a rank is
#: lost, without whose file there will be none.
LAST_WORDS, LAST_WORDS_LOST = 60.0, 2.0


class Loop:
    """Runs steps from wherever the progress stands to the end, a stop request or the time box.

    Every rank runs it, and all take the same turns; the first one writes the metrics and speaks.
    """

    def __init__(
        self,
        trainer: Trainer,
        dataset: Dataset,
        progress: Progress,
        console: Console,
        meeting: Meeting,
        resumed_from: Path | None = None,
        lease: Lease | None = None,
    ) -> None:
        self.trainer, self.dataset, self.progress = trainer, dataset, progress
        self.meeting = meeting
        self.config: Config = trainer.config
        self.console = console
        self.metrics: PatientWriter | None = None
        self.saver = Saver(trainer, dataset, meeting, resumed_from, lease, self._sync_rows)
        self.directory: Path = self.config.run.directory
        self.total_steps = self.config.train.total_steps
        self.ranks = trainer.place.grid.size
        self.profile = Profile(trainer, meeting, console.message)
        self.guard = Guard(trainer, meeting, lease, console.message)
        self.spikes = Spikes(trainer, dataset, meeting, self.saver.disk, console.message, lease)

    def run(self, stop: StopSignals) -> int:
        """Train; return the exit code. Whatever stops all ranks alike, the last step is saved.

        Raises:
            DivergedError: ten steps in a row were not finite, and nothing is saved; or the run's
                last was not, and it is saved beside the older checkpoints.
        """
        with ExitStack() as stack:
            self.meeting.hold(lambda: self._open_metrics(stack))
            self.tracker = self._tracker()
            stack.callback(self.tracker.close)
            try:
                code = self._steps(stop)
                self._save_last()
                if code == EXIT_INTERRUPTED:
                    self.guard.stopped()
            except Exception as error:  # a second Ctrl-C waits for nothing
                lost = isinstance(error, LostError)
                with suppress(Exception):  # what ended the run is what is told
                    self.saver.finish(LAST_WORDS_LOST if lost else LAST_WORDS)
                    self._report_saves()
                raise
            if code == EXIT_DONE and self.progress.failures:
                raise self._diverged("the last of the run")
        return code

    def _steps(self, stop: StopSignals) -> int:
        minutes = self.config.train.max_minutes
        deadline = time.monotonic() + 60 * minutes if minutes else math.inf

        def requests() -> tuple[bool, ...]:
            interrupted = stop.code == EXIT_INTERRUPTED or self.guard.stop_asked()
            return stop.code == EXIT_STOPPED, interrupted, time.monotonic() > deadline

        while self.progress.step < self.total_steps:
            agreed = self._step(requests)
            every = self.config.checkpoint.every
            if every and self.progress.step % every == 0 and not self.progress.failures:
                self.saver.start(self.progress)
            self._report_saves()
            # Ranks hear of a signal at different times: what they agreed on in the step counts.
            terminated, interrupted, late = agreed if self.ranks > 1 else requests()
            if interrupted:
                return EXIT_INTERRUPTED
            if terminated:
                return EXIT_STOPPED
            if late and self.progress.step < self.total_steps:
                self.console.message(f"time box of {minutes:g} minutes: saving and stopping")
                return EXIT_STOPPED
        return EXIT_DONE

    def _step(self, requests: Callable[[], tuple[bool, ...]]) -> tuple[bool, ...]:
        """One step; returns which of `requests` a rank made during it."""
        config, progress = self.config, self.progress
        step = progress.step + 1
        began = time.perf_counter()
        self.guard.stragglers.before()
        lr = learning_rate(config.optimizer, step, self.total_steps)
        batch = self._batch()
        norms_every = config.log.layer_norms_every
        layer_norms = bool(norms_every) and step % norms_every == 0
        self.profile.before(step)
        result = self.trainer.step.run(
            batch,
            lr,
            layer_norms,
            lambda: (*self.guard.alarms(step), self.profile.asked(), *requests()),
        )
        self.guard.heed(result.requests[:2], step)
        seconds = time.perf_counter() - began
        self.profile.after(step, result.requests[2])
        self.guard.stragglers.after(step, seconds)
        self._did(step)
        if self._went_back(result):
            return result.requests[3:]
        progress.step = step
        progress.samples += config.train.global_batch
        progress.tokens += result.tokens
        self._count(result)
        self.spikes.note(progress, result)
        row = step_row(self.trainer, self.dataset, progress, result, lr, seconds)
        self._log(row)
        self.tracker.step(row, progress.samples)
        self.console.step(row)
        if config.validation.every and (
            step % config.validation.every == 0 or step == self.total_steps
        ):
            self._validate()
        return result.requests[3:]

    def _did(self, step: int) -> None:
        """For what is said of ranks that are lost later."""
        self.meeting.did(step)
        if self.trainer.groups.watch is not None:
            self.trainer.groups.watch.step = step

    def _went_back(self, result: StepResult) -> bool:
        """Whether the step that was just done is a spike and is undone, with those before it."""
        usual = self.spikes.usual(self.progress, result)
        if usual is None:
            return False
        self.saver.finish()
        self._report_saves()
        step = self.progress.step + 1
        words = f"step {step}: the loss is {result.loss:.4g}, and its median was {usual:.4g}"
        found = self.spikes.go_back(self.progress, words)
        if found is None:
            return False
        self.saver.newest, self.progress = found[0].resolve(), found[1]
        self.meeting.hold(self._take_rows_back)
        why = {"from_step": step, "loss": result.loss, "median": usual}
        self._log(
            {
                "step": self.progress.step + 1,  # taken again, and so is this row, after a kill
                "tokens": self.progress.tokens,
                "rewind": {**why, "skipped_samples": self.progress.skips[-1]},
            }
        )
        return True

    def _batch(self) -> Batch:
        place = self.trainer.place
        count = self.config.train.global_batch // place.grid.data
        first = self.progress.samples + count * place.along("data")
        try:
            return self.dataset.batch(first, count)
        except CorruptError:
            if self.ranks == 1:
                self._save_last()  # the steps up to here are sound; others might not see the damage
            raise

    def _count(self, result: StepResult) -> None:
        progress = self.progress
        if result.applied:
            progress.updates += 1
            progress.failures = 0
            return
        progress.skipped += 1
        reason = result.fault or "no token of the batch has a label"
        self.console.message(f"step {progress.step} left out: {reason}")
        if result.fault is not None:
            progress.failures += 1
        if progress.failures >= MOST_FAILURES:
            raise self._diverged(reason)

    def _diverged(self, reason: str) -> DivergedError:
        return DivergedError(
            f"step {self.progress.step}: {self.progress.failures} steps in a row were not finite "
            f"({reason}); resume from the last checkpoint with a lower optimizer.lr"
        )

    def _validate(self) -> None:
        result = validate(self.trainer, self.dataset)
        row = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "validation_loss": result.loss,
            "validation_loss_per_source": result.by_source,
        }
        self._log(row)
        self.tracker.validation(row, self.progress.samples)
        self.console.validation(row)

    def _save_last(self) -> None:
        """Save this step, unless it is saved, and wait for it."""
        self.saver.finish()
        self._report_saves()
        self.saver.save_last(self.progress)
        self._report_saves()

    def _report_saves(self) -> None:
        """Say which saves failed since the last call: the run goes on without them."""
        for save in self.saver.ended():
            if save.error:
                message = f"no checkpoint of step {save.step}: {save.error}; older ones are intact"
                row = {"step": self.progress.step, "tokens": self.progress.tokens}
                self._log(row | {"failed_save": {"step": save.step, "reason": str(save.error)}})
                self.console.message(message)
            elif save.warning:
                self.console.message(save.warning)

    def _open_metrics(self, stack: ExitStack) -> str:
        path = self.directory / "metrics.jsonl"
        if self.meeting.leads:
            with refuse_os_errors("write", path):
                writer = stack.enter_context(MetricsWriter(path, self.saver.disk))
            self.metrics = PatientWriter(writer, self.console.message)
            stack.callback(self.metrics.finish)
        return self._take_rows_back()

    def _take_rows_back(self) -> str:
        """Drop the rows of steps that are to be taken again."""
        if self.metrics:
            self.metrics.take_back(self.progress.step)
        return ""

    def _sync_rows(self) -> None:
        if self.metrics:
            self.metrics.sync()

    def _log(self, row: dict[str, Any]) -> None:
        if self.metrics and not self.guard.replaced:  # else the file is another job's
            self.metrics.write(row)

    def _tracker(self) -> Tracker:
        config = self.config
        return wandb_tracker(
            config.log.wandb if self.meeting.leads else "off",
            self.directory,
            name=config.run.name,
            config=config.model_dump(mode="json"),
            warn=self.console.message,
        )
