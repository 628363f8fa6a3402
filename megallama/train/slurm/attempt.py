"""What one attempt to train left in its folder, RUN_DIR/slurm/JOB.RESTARTS.NUMBER/."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from megallama.errors import ConfigError
from megallama.files import write_atomic

ERROR = "megallama: error: "
#: Bytes at the end of a rank's log that are searched for its error.
TAIL = 64_000


@dataclass(frozen=True)
class End:
    """How a task ended that did not end with 0, and on which node."""

    code: int
    node: str


@dataclass(frozen=True)
class Health:
    """What a node found about itself, in GB/s: `bandwidth` of its GPUs' all-reduce, `links` of an
    exchange with each of its neighbours, by name; 0 where that failed."""

    node: str
    time: float
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    bandwidth: float | None = None
    finished: bool = True
    links: Mapping[str, float] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        write_atomic(folder / f"{self.node}.json", json.dumps(asdict(self)).encode())


class Attempt:
    """Reads the folder; what is torn or missing there was not said.

    Raises:
        ConfigError: its name is not that of an attempt.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        job, _, rest = folder.name.partition(".")
        restarts, _, number = rest.partition(".")
        if not (job.isdecimal() and restarts.isdecimal() and number.isdecimal()):
            raise ConfigError(f"{folder}: is no attempt's folder; its name is JOB.RESTARTS.NUMBER")
        self.job, self.restarts = job, int(restarts)

    def begin(self) -> None:
        """Note the time: by the clock of the script's node."""
        write_atomic(self.folder / "began", str(time.time()).encode())

    @property
    def began(self) -> float:
        """When `begin` was called; 0.0 where it never was."""
        with suppress(OSError, ValueError):
            return float((self.folder / "began").read_text())
        return 0.0

    @cached_property
    def nodes(self) -> dict[int, str]:
        """Node of the step → its name."""
        return {int(name): text for name, text in self._texts("started").items()}

    @cached_property
    def ends(self) -> dict[int, End]:
        """Task → how it ended, where that was not with 0."""
        found = {}
        for name, text in self._texts("ended").items():
            code, _, node = text.partition(" ")
            if code.isdecimal():
                found[int(name)] = End(int(code), node)
        return found

    @cached_property
    def errors(self) -> dict[int, str]:
        """Task → the line that it ended with, for those that said one."""
        found = {}
        for task in sorted(self.ends):
            with suppress(OSError), open(self.folder / f"rank-{task}.log", "rb") as log:
                log.seek(max(0, log.seek(0, 2) - TAIL))
                text = log.read().decode(errors="replace")
                if lines := re.findall(rf"^{ERROR}(.*)$", text, re.MULTILINE):
                    found[task] = lines[-1]
        return found

    @cached_property
    def health(self) -> Mapping[str, Health]:
        """Node → what it found."""
        found = {}
        for path in (self.folder / "health").glob("*.json"):
            with suppress(OSError, ValueError, TypeError):
                found[path.stem] = Health(**json.loads(path.read_bytes()))
        return found

    def _texts(self, kind: str) -> dict[str, str]:
        """Number → the first line of its file."""
        found = {}
        for path in (self.folder / kind).iterdir() if (self.folder / kind).is_dir() else ():
            with suppress(OSError, UnicodeDecodeError):
                text = path.read_text().strip()
                if path.name.isdecimal() and text:
                    found[path.name] = text
        return found
