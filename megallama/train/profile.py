"""Recording training steps: what ranks computed and communicated, and when, as one file."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megallama.config import schema
from megallama.errors import UserError
from megallama.files import write_atomic
from megallama.train.build import Trainer
from megallama.train.meeting import Meeting
from megallama.train.profile_request import RequestFile
from megallama.train.trace import (
    FOLDER,
    RankTimeline,
    Timeline,
    dump_rank,
    load_rank,
    on_one_clock,
    place_words,
    timeline_name,
    trace_of,
)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Profile:
    """Records the steps that the config's `train.profile` names, each time the run reaches them,
    and those that a file `RUN_DIR/profile` asks for while it runs.

    The loop calls `before` and `after` around every step, and `asked` in it. After the last step to
    be recorded rank 0 writes RUN_DIR/profiles/step-XXXXXXXX.json, named by the first. A run that
    stops in between writes nothing, and neither does one that is resumed later than they are. A
    timeline is not worth a run: where it cannot be written, or is asked for wrongly while the run
    goes on, `say` is told and training goes on. While one is recorded, another request waits.
    """

    def __init__(self, trainer: Trainer, meeting: Meeting, say: Callable[[str], None]) -> None:
        self._groups, self._place, self._device = trainer.groups, trainer.place, trainer.device
        self._config, self._meeting, self._say = trainer.config, meeting, say
        self._folder = trainer.config.run.directory / FOLDER
        self._file = RequestFile(trainer.config.run.directory)
        self._request: schema.Profile | None = None
        self._now: schema.Profile | None = None
        self._first = self._last = 0

    def asked(self) -> bool:
        """Whether a file asks for a profile, to be agreed on by all ranks: rank 0 looks."""
        idle = self._now is None and self._request is None
        return self._meeting.leads and idle and self._file.settled()

    def before(self, step: int) -> None:
        """Begin to record, where this is the first step to be recorded."""
        if self._now is not None:
            return
        planned, request = self._config.train.profile, self._request
        if planned and planned.start <= step < planned.start + planned.steps:
            self._now, last = planned, planned.start + planned.steps - 1
        elif request and request.start <= step:
            self._now, last = request, step + request.steps - 1
            self._request = None
        else:
            return
        self._first, self._last = step, min(last, self._config.train.total_steps)
        self._groups.recorder.on = self._is_recorded(self._now)

    def after(self, step: int, asked: bool = False) -> None:
        """Write the file, where this was the last step to be recorded. `asked`: whether all ranks
        agreed in this step that a file asks for a profile.

        Raises LostError where another rank does not come.
        """
        if self._now is not None and step == self._last:
            recorded, is_recorded = self._recorded(), self._is_recorded(self._now)
            self._now = None
            rank = dump_rank(recorded) if is_recorded else ""
            self._say(self._meeting.hold(lambda: rank, self._write))
        if asked and step < self._config.train.total_steps:
            self._hear(step + 1)

    def _is_recorded(self, profile: schema.Profile) -> bool:
        return profile.ranks is None or self._place.rank in profile.ranks

    def _hear(self, step: int) -> None:
        """All ranks learn what the file asks for, or what is wrong with it."""

        def take() -> str:
            if not self._meeting.leads:
                return ""
            try:
                asked = self._file.take(self._config, self._place.grid.size, step)
            except UserError as error:
                return json.dumps([None, f"nothing is recorded: {error}"])
            first = max(step, asked.start)
            steps = f"step {first}" + f" to {first + asked.steps - 1}" * (asked.steps > 1)
            return json.dumps([asked.model_dump(), f"{self._file.path}: recording {steps}"])

        asked, message = json.loads(self._meeting.hold(take))
        self._request = schema.Profile(**asked) if asked else None
        self._say(message)

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

    def _write(self, ranks: Sequence[str]) -> str:
        """Write the file; returns what there is to say of it."""
        step = self._first
        path = self._folder / timeline_name(step)
        try:
            timeline = Timeline(step, on_one_clock([load_rank(text) for text in ranks if text]))
            write_atomic(path, trace_of(timeline))
        except UserError as error:
            return f"no timeline of step {step}: {error}"
        return f"timeline of step {step}: {path}"


def clock_name() -> str:
    """The same text wherever `time.monotonic` is the same clock: under one running kernel.

    Host names will not do: two containers of a machine have two, and one clock.
    """
    try:
        return BOOT_ID.read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()
