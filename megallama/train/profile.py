"""Recording a training step: what every rank computed and communicated, and when, as one file."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megallama.errors import UserError
from megallama.files import write_atomic
from megallama.spec.grid import Place
from megallama.train.build import Trainer
from megallama.train.meeting import Meeting
from megallama.train.trace import (
    RankTimeline,
    Timeline,
    dump_rank,
    load_rank,
    on_one_clock,
    timeline_name,
    trace_of,
)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Profile:
    """Records the steps that the config's `train.profile` names, each time the run reaches them.

    The loop calls `before` and `after` around every step. After the last of them rank 0 writes
    RUN_DIR/profile/step-XXXXXXXX.json, named by the first. A run that stops in between writes
    nothing, and neither does one that is resumed later than they are. A timeline is not worth a
    run: where it cannot be written, `say` is told and training goes on.
    """

    def __init__(self, trainer: Trainer, meeting: Meeting, say: Callable[[str], None]) -> None:
        self._groups, self._place, self._device = trainer.groups, trainer.place, trainer.device
        self._meeting, self._say = meeting, say
        self._folder = trainer.config.run.directory / "profile"
        train = trainer.config.train
        asked = train.profile
        self._steps = range(asked.start, asked.start + asked.steps) if asked else range(0)
        self._last = min(self._steps.stop - 1, train.total_steps)
        self._first: int | None = None

    def before(self, step: int) -> None:
        """Begin to record, where this is the first step to be recorded."""
        if step in self._steps and self._first is None:
            self._first = step
            self._groups.recorder.on = True

    def after(self, step: int) -> None:
        """Write the file, where this was the last step to be recorded.

        Raises LostError where another rank does not come.
        """
        if self._first is None or step != self._last:
            return
        rank = dump_rank(self._recorded())
        first, self._first = self._first, None
        self._say(self._meeting.hold(lambda: rank, lambda ranks: self._write(first, ranks)))

    def _recorded(self) -> RankTimeline:
        # The data ranks still gather the new weights. A group runs its operations in order, so one
        # more that is waited for has those gathers end, and be recorded; itself it is left out.
        data, recorder = self._groups["data"], self._groups.recorder
        data.all_reduce(torch.zeros(1, device=self._device)).wait()
        recorder.on = False
        events = recorder.take()
        if own := [place for place, event in enumerate(events) if event.kind == data.name]:
            del events[own[-1]]
        return RankTimeline(place_words(self._place), clock_name(), tuple(events))

    def _write(self, step: int, ranks: Sequence[str]) -> str:
        """Write the file; returns what there is to say of it."""
        path = self._folder / timeline_name(step)
        try:
            timeline = Timeline(step, on_one_clock([load_rank(text) for text in ranks]))
            write_atomic(path, trace_of(timeline))
        except UserError as error:
            return f"no timeline of step {step}: {error}"
        return f"timeline of step {step}: {path}"


def place_words(place: Place) -> str:
    """Such as `pp 0 · dp 1 · tp 0`."""
    axes = (("pp", place.along("pipeline")), ("dp", place.along("data")))
    return " · ".join(f"{axis} {index}" for axis, index in (*axes, ("tp", place.along("tensor"))))


def clock_name() -> str:
    """The same text wherever `time.monotonic` is the same clock: under one running kernel.

    Host names will not do: two containers of a machine have two, and one clock.
    """
    try:
        return BOOT_ID.read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()
