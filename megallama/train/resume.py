"""Where a run goes on from: each rank reads its share, and all agree which checkpoint is intact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from megallama.checkpoint.manifest import MANIFEST
from megallama.checkpoint.store import Checkpoint, committed_checkpoints
from megallama.data.dataset import Dataset
from megallama.errors import ConfigError, CorruptError
from megallama.train.agree import refuse_differences
from megallama.train.build import Trainer
from megallama.train.meeting import Meeting
from megallama.train.snapshot import Progress, find_checkpoint, read_state


def candidates(directory: Path, resume: str, meeting: Meeting) -> list[Path]:
    """The checkpoints to begin from, the best first: rank 0 looks, the others take its word.

    Raises:
        ConfigError: it would leave checkpoints of another course in the run's `directory`.
    """

    def find() -> str:
        found = _find(directory, resume) if meeting.leads else []
        return json.dumps([str(path) for path in found])

    return [Path(path) for path in json.loads(meeting.hold(find))]


def begin(
    trainer: Trainer,
    paths: Sequence[Path],
    dataset: Dataset,
    meeting: Meeting,
    say: Callable[[str], None],
) -> tuple[Path | None, Progress]:
    """Fill the trainer from the first of `paths` that is intact; where none is given, from nothing.

    A rank verifies what it reads, so that each byte of a checkpoint is verified by a rank that
    needs it. A fault that any rank finds passes the checkpoint over for all, and is named through
    `say`.

    Raises:
        CorruptError: none is intact. Starting anew would be silent loss.
        ConfigError: one is of another run, or is not the same on every rank.
    """
    if not paths:
        return None, Progress()
    faults = []
    with trainer.zero.changing_masters():
        for path in paths:
            progress, fault = _try(trainer, path, dataset, meeting)
            if not fault:
                break
            if len(paths) > 1:
                say(f"passed over a damaged checkpoint: {fault}")
            faults.append(fault)
        else:
            if len(paths) == 1:
                raise _shared(CorruptError(faults[0]))
            raise _shared(
                CorruptError(
                    f"{paths[0].parent}: none of its {len(paths)} checkpoints is intact; "
                    "restore one from a copy, or choose another run.name to start anew"
                )
            )
    say(f"resumed from {path}")
    return path, progress


def _try(trainer: Trainer, path: Path, dataset: Dataset, meeting: Meeting) -> tuple[Progress, str]:
    """The progress of a checkpoint, and the fault that a rank found, if any."""
    progress = Progress()

    def read() -> str:
        nonlocal progress
        try:
            progress = read_state(trainer, Checkpoint(path), dataset)
            digest = hashlib.blake2b((path / MANIFEST).read_bytes()).hexdigest()
        except CorruptError as error:
            return json.dumps({"fault": str(error)})
        return json.dumps({f"the checkpoint {path}": digest})

    def judge(ranks: Sequence[str]) -> str:
        faults = [said["fault"] for said in map(json.loads, ranks) if "fault" in said]
        if not faults:
            refuse_differences(ranks)
        return faults[0] if faults else ""

    fault = meeting.hold(read, judge)
    return progress, fault


def _shared(error: CorruptError) -> CorruptError:
    """Every rank raises it alike."""
    error.shared = True
    return error


def _find(directory: Path, resume: str) -> list[Path]:
    folder = directory / "checkpoints"
    own = committed_checkpoints(folder)
    if resume == "auto":
        return own[::-1]
    if resume == "none":
        if own:
            raise ConfigError(
                f"--resume none: {directory} already holds checkpoints; "
                "choose another run.name, or remove the directory"
            )
        return []
    checkpoint = find_checkpoint(Path(resume))
    if own and own[-1].resolve() != checkpoint.directory.resolve():
        raise ConfigError(
            f"--resume {resume}: {directory} has a checkpoint of its own, {own[-1].name}; "
            "use --resume auto, choose another run.name, or remove those after it"
        )
    return [checkpoint.directory]
