"""A profile that is asked for while a run goes on: a file `profile` in the run's directory."""

from __future__ import annotations

import stat
import time
from contextlib import suppress
from pathlib import Path

from megallama.config.load import parse_config, read_yaml
from megallama.config.schema import Config, Profile
from megallama.errors import ConfigError
from megallama.files import refuse_os_errors
from megallama.spec.grid import make_grid

#: A file that is longer asks for something else.
MOST_BYTES = 1 << 16


class RequestFile:
    """`RUN_DIR/profile`, which anyone may make who can write there.

    It is empty, for one step of all ranks, or has keys of `train.profile` as YAML; `start` is then
    the next step unless it is given. One rank looks for it, at most once in `SECONDS`: a look at a
    shared file system may take a millisecond.
    """

    SECONDS = 1.0

    def __init__(self, directory: Path) -> None:
        self.path = directory / "profile"
        self._next = 0.0
        self._last_look: tuple[int, int] | None = None
        self._stuck = False

    def settled(self) -> bool:
        """Whether it is there, as it was at the look before: whoever writes it has ended."""
        now = time.monotonic()
        if self._stuck or now < self._next:
            return False
        self._next = now + self.SECONDS
        look = None
        with suppress(OSError):
            found = self.path.stat()
            if stat.S_ISREG(found.st_mode):  # such as a directory is none of ours
                look = found.st_size, found.st_mtime_ns
        before, self._last_look = self._last_look, look
        return look is not None and look == before

    def take(self, config: Config, processes: int, step: int) -> Profile:
        """What it asks for, where the next step is `step`. The file is gone then.

        Raises:
            ConfigError: it asks for what cannot be, or it cannot be deleted; then it is looked for
                no more.
        """
        self._last_look = None
        try:
            asked = self._read(config, step)
        finally:
            self._stuck = True
            with refuse_os_errors("delete", self.path):
                self.path.unlink(missing_ok=True)
            self._stuck = False
        make_grid(asked, processes)
        assert asked.train.profile is not None  # it has a start at least
        return asked.train.profile

    def _read(self, config: Config, step: int) -> Config:
        """The run's config, with what the file asks for as its `train.profile`."""
        with refuse_os_errors("read", self.path):
            size = self.path.stat().st_size
        if size > MOST_BYTES:
            raise ConfigError(f"{self.path}: {size} bytes; leave it empty, or write `steps: 2`")
        given = read_yaml(self.path)
        if not isinstance(given, dict | None):
            raise ConfigError(f"{self.path}: not a mapping; leave it empty, or write `steps: 2`")
        sections = config.model_dump(mode="json")
        sections["train"]["profile"] = {"start": step} | (given or {})
        try:
            return parse_config(sections)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {'; '.join(str(error).splitlines())}") from None
