"""Whatever the disk refuses in the course of a save, the checkpoint before stays, and is found."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megallama.checkpoint.store import Checkpoint, checkpoint_path, committed_checkpoints
from megallama.errors import ConfigError, LostError, UserError
from tests.chaos import power
from tests.chaos.disks import CHANGES, Counting, refusing

CODES = (errno.EIO, errno.ENOSPC, errno.EDQUOT)


def whole(folder: Path) -> list[int]:
    """The steps of all checkpoints, each read wholly and found to be its step's."""
    steps = []
    for path in committed_checkpoints(folder):
        checkpoint = Checkpoint(path)
        checkpoint.verify()
        step = checkpoint.manifest.state["step"]
        tensors = power.tensors(step)
        assert all(checkpoint.read(name).equal(tensors[name]) for name in tensors)
        steps.append(step)
    return steps


def calls_of_a_save(folder: Path) -> dict[str, int]:
    """How often a second save asks for each operation; the first is deleted in it."""
    disk = Counting()
    power.save(folder, 2, power.DISK)
    power.save(folder, 4, disk)
    return disk.calls


@pytest.mark.parametrize("kind", CHANGES)
def test_every_refusal_leaves_a_checkpoint(tmp_path: Path, kind: str) -> None:
    calls = calls_of_a_save(tmp_path / "count")[kind]
    assert calls > 0
    for call in range(1, calls + 1):
        for code in CODES:
            folder = tmp_path / f"{call}-{code}"
            power.save(folder, 2, power.DISK)
            with pytest.raises(UserError, match=os.strerror(code)) as caught:
                power.save(folder, 4, refusing(kind, call, code))
            assert type(caught.value) is (LostError if code == errno.EIO else ConfigError)
            assert str(folder) in str(caught.value)
            assert "\n" not in str(caught.value)
            assert whole(folder)[-1:] in ([2], [4])
            if not (checkpoint_path(folder, 4) / "manifest.json").exists():
                assert whole(folder) == [2]
            power.save(folder, 6, power.DISK)
            assert whole(folder) == [6]
            assert [path.name for path in folder.iterdir()] == ["step-00000006"]
