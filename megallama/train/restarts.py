"""Whether a job that lost a rank begins again by itself, and from where."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from megallama.checkpoint.folder import NOTHING, last_written
from megallama.errors import ConfigError, LostError
from megallama.train.local_worker import Work


class Restarts:
    """Up to `limit` restarts in a row that save no new checkpoint in the run's `directory`.

    `work_from` makes the work of an attempt from what `--resume` would say. `resume` is what it
    says for as long as the run has no checkpoint of its own.
    """

    def __init__(
        self, limit: int, directory: Path, work_from: Callable[[str], Work], resume: str
    ) -> None:
        if limit < 0:
            raise ConfigError(f"--restarts {limit}: give 0 or more")
        self.limit, self.folder = limit, directory / "checkpoints"
        self.work_from, self.resume = work_from, resume
        self.fruitless = 0
        self._newest = NOTHING

    def first(self) -> Work:
        """The work of the first attempt. The workers may be forked after this, not before."""
        if self.limit:
            self._newest = last_written(self.folder)
        return self.work_from(self.resume)

    def again(self, error: LostError) -> Work | None:
        """The work of the next attempt, or None where it is time to give up."""
        newest = last_written(self.folder)
        if newest.time > self._newest.time:
            self._newest, self.fruitless = newest, 0
        if self.fruitless == self.limit:
            return None
        self.fruitless += 1
        start = f"from {newest.name}" if newest.name else "from its start"
        print(
            f"megallama: {error}; restart {self.fruitless} of {self.limit} {start}",
            file=sys.stderr,
            flush=True,
        )
        return self.work_from("auto" if newest.name else self.resume)
