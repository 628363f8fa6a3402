"""A power failure at any point of several saves leaves the newest finished checkpoint."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.chaos import power
from tests.chaos.disks import Recorder


def test_every_cut_leaves_the_newest_checkpoint(tmp_path: Path) -> None:
    course = power.record(tmp_path / "root")
    kinds = {operation.kind for operation in course.log}
    assert {"mkdir", "create", "append", "sync", "sync_names", "rename", "unlink", "rmdir"} == kinds
    for cut in range(len(course.log) + 1):
        for draw in range(2):
            fault = power.lost(course, cut, random.Random(f"{cut}/{draw}"))
            assert not fault, f"cut {cut}, draw {draw}, after {course.log[cut - 1].kind}"


class NoSync(Recorder):
    """The bytes of files are never asked to the disk."""

    def sync(self, descriptor: int) -> None:
        pass


class NoNames(Recorder):
    """Names in the directories of checkpoints are never asked to the disk."""

    def sync_names(self, directory: Path) -> None:
        if directory.name.startswith("step-"):
            return
        super().sync_names(directory)


class NoDirectory(Recorder):
    """The names of the directories themselves are not."""

    def sync_names(self, directory: Path) -> None:
        if directory.name == "checkpoints":
            return
        super().sync_names(directory)


class NoParents(Recorder):
    """Nor that of the run."""

    def sync_names(self, directory: Path) -> None:
        if directory.name == "runs":
            return
        super().sync_names(directory)


class EarlyManifest(Recorder):
    """The manifest's rename comes to the disk before its bytes."""

    def sync(self, descriptor: int) -> None:
        if not self.log[-1].data.startswith(b'{\n "format"'):
            super().sync(descriptor)


@pytest.mark.parametrize("kind", [NoSync, NoNames, NoDirectory, NoParents, EarlyManifest])
def test_a_sync_that_is_left_out_is_found(tmp_path: Path, kind: type[Recorder]) -> None:
    """So the test above can fail."""
    course = power.record(tmp_path / "root", kind)
    cuts = [*range(len(course.log) + 1)] * 20
    assert any(power.lost(course, cut, random.Random(n)) for n, cut in enumerate(cuts))
