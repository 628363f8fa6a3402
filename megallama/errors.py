"""The errors a user can cause or meet, each with its documented exit code.

An error names the thing, the value and the way out in one line; the command line prints that line
and exits with `exit_code`. Anything else that escapes is a bug and shows a traceback (exit code 1).
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1  # a bug, or training that diverged
EXIT_CORRUPT = 65  # corrupt data or checkpoint
EXIT_LOST = 69  # a rank, device or network was lost: retry
EXIT_STOPPED = 75  # stopped by a signal or the time box after saving: requeue
EXIT_CONFIG = 78  # bad configuration
EXIT_INTERRUPTED = 130  # stopped by the user after saving: do not requeue


class UserError(Exception):
    """Base of every error shown as one line rather than as a traceback.

    `shared` is True where every process of the job raises it alike, `follows` where it may follow
    from another process's end, which then has the cause to say: else the fault was met here.
    """

    exit_code = EXIT_FAILED
    shared = False
    follows = False


class ConfigError(UserError):
    """The configuration, or what it points at, cannot be trained (exit code 78)."""

    exit_code = EXIT_CONFIG


class LostError(UserError):
    """A device or a network did not answer: the same command may succeed later (exit code 69).

    `peer`: the global rank that is missing, where it is one: then the error `follows`; `owed`: what
    that rank was to do.
    """

    exit_code = EXIT_LOST

    def __init__(
        self, message: str, *, peer: int | None = None, owed: str = "", follows: bool = False
    ) -> None:
        super().__init__(message)
        self.peer, self.owed = peer, owed
        self.follows = follows or peer is not None


class CorruptError(UserError):
    """A data file or checkpoint is damaged (exit code 65)."""

    exit_code = EXIT_CORRUPT


class DivergedError(UserError):
    """Training produced non-finite values ten steps in a row (exit code 1)."""


def said_by(rank: int, text: str) -> str:
    """An error's text with the rank that met it in front, once."""
    prefix = f"rank {rank}: "
    return text if text.startswith(prefix) else prefix + text
