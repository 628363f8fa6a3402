"""Whole runs whose disk refuses an operation of a save or of a row: once, or from then on. The run
lives on or ends by its documented code, the checkpoint before is intact, and what goes on from it
is the run that nothing was refused to.

    python -m tests.chaos.refusals --n 200 --seed 0

draws cases; `--all` has every operation of a run refused with every code, once and for ever.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed import Store

from megallama.checkpoint.store import DISK, Checkpoint, committed_checkpoints
from megallama.config.load import load_config
from megallama.config.schema import Config
from megallama.errors import ConfigError, LostError, UserError
from megallama.train.job import train
from megallama.train.process import Process
from tests.chaos.disks import CHANGES
from tests.conftest import TinyData, losses
from tests.dist.commands import write_config
from tests.dist.processes import LOCAL, run_on

RANKS = {"one": 1, "data": 2}
CODES = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
#: What saves ask of the disk, and then metrics.jsonl, of rank 0's.
OPEN, ROW = "open_log", "extend"
KINDS = (*CHANGES, OPEN, ROW, "sync_log")
#: Saves at steps 2, 4 and 6; the last deletes the first.
SECTIONS: dict[str, Mapping[str, Any]] = {
    "train": {"steps": 6, "precision": "fp32"},
    "validation": {"every": 0},
    "checkpoint": {"every": 2, "keep": 2},
    "parallel": {"timeout_seconds": 10},
}


class Refusal(NamedTuple):
    """The `call`th operation of a kind, from 1, that a rank asks for; `lasting`: and all later
    ones."""

    layout: str
    rank: int
    kind: str
    call: int
    code: int
    lasting: bool

    def __str__(self) -> str:
        how = "from call" if self.lasting else "call"
        name = errno.errorcode[self.code]
        return f"{self.layout}, rank {self.rank}: {name} for {self.kind}, {how} {self.call}"


class Ended(NamedTuple):
    """How a rank ended. `before`: the newest checkpoint when its disk first refused."""

    code: int
    error: str
    output: str
    before: str | None
    calls: dict[str, int]


class Range:
    """Where these runs are. One that nothing is refused to is done once for each layout."""

    def __init__(self, folder: Path, data: TinyData) -> None:
        self.folder = folder
        self.path = write_config(folder, data, **SECTIONS)
        self._straight: dict[str, list[Ended]] = {}

    def straight(self, layout: str) -> list[Ended]:
        if layout not in self._straight:
            ends = self._straight[layout] = self._run(self.config(layout), layout)
            assert [end.code for end in ends] == [0] * RANKS[layout], ends
        return self._straight[layout]

    def config(self, name: str) -> Config:
        return load_config(self.path, [f"run.name={name}"])

    def every(self, layout: str) -> Iterator[Refusal]:
        """All that a run asks of the disk, with every code, once and for ever."""
        for rank, end in enumerate(self.straight(layout)):
            for kind, calls in end.calls.items():
                for call in range(1, calls + 1):
                    for code in CODES:
                        for lasting in (False, True):
                            yield Refusal(layout, rank, kind, call, code, lasting)

    def faults_of(self, refusal: Refusal) -> list[str]:
        """What went otherwise than it should."""
        self.straight(refusal.layout)
        config, reference = self.config("refused"), self.config(refusal.layout)
        shutil.rmtree(config.run.directory, ignore_errors=True)
        ends = self._run(config, refusal.layout, refusal)
        faults = [*_wrong_ends(ends, refusal), *_damage(config, ends, ends[refusal.rank].before)]
        if ends[0].code:
            again = self._run(config, refusal.layout)
            if any(end.code for end in again):
                faults.append(f"it did not go on: {again}")
        return [*faults, *_unlike(config, reference, refusal)]

    def _run(self, config: Config, layout: str, refusal: Refusal | None = None) -> list[Ended]:
        def body(rank: int, store: Store) -> Ended:
            before: list[str | None] = []
            calls = dict.fromkeys(KINDS, 0)
            for kind in KINDS:
                here = refusal is not None and (refusal.rank, refusal.kind) == (rank, kind)
                _watch(
                    kind, calls, refusal if here else None, lambda: before.append(_newest(config))
                )
            size = RANKS[layout]
            process = Process(rank, size, rank, size, store if size > 1 else None, LOCAL)
            output = io.StringIO()
            code, words = 0, ""
            with redirect_stdout(output):
                try:
                    code = train(config, process=process)
                except UserError as error:
                    code, words = error.exit_code, str(error)
            return Ended(code, words, output.getvalue(), before[0] if before else None, calls)

        return run_on(RANKS[layout], body, time_limit=120.0)


def _watch(
    kind: str, calls: dict[str, int], refusal: Refusal | None, refused: Callable[[], None]
) -> None:
    """Count this process's operations of a kind on its disk, and refuse as asked."""
    real = getattr(DISK, kind)

    def sometimes(*arguments: Any) -> Any:
        calls[kind] += 1
        if refusal is not None:
            late = calls[kind] > refusal.call and refusal.lasting
            if late or calls[kind] == refusal.call:
                refused()
                raise OSError(refusal.code, os.strerror(refusal.code))
        return real(*arguments)

    setattr(DISK, kind, sometimes)


def _newest(config: Config) -> str | None:
    found = committed_checkpoints(config.run.directory / "checkpoints")
    return found[-1].name if found else None


def _wrong_ends(ends: list[Ended], refusal: Refusal) -> Iterator[str]:
    """Every rank ends alike, by the code of the refusal or by none, and one says what it was. What
    is refused but once ends no run that has begun."""
    ends_it = refusal.lasting or refusal.kind == OPEN
    kind = LostError if refusal.code == errno.EIO else ConfigError
    codes = {end.code for end in ends}
    if len(codes) > 1 or codes - {0, kind.exit_code} or (codes != {0} and not ends_it):
        yield f"exit codes {[end.code for end in ends]}: {[end.error for end in ends]}"
    told = "".join(end.output + end.error for end in ends)
    if os.strerror(refusal.code) not in told:
        yield f"nothing was said of it: {told[-500:]!r}"


def _damage(config: Config, ends: list[Ended], before: str | None) -> Iterator[str]:
    """The checkpoint that there was is there, or a newer one; what is there is intact.

    One whose manifest had its name, which could not be synced, is taken back and told of.
    """
    found = committed_checkpoints(config.run.directory / "checkpoints")
    taken_back = any(f"{before}/" in line for end in ends for line in _failures(end))
    if before is not None and not taken_back and (not found or found[-1].name < before):
        yield f"{before} was there, and now {[path.name for path in found]}"
    for path in found:
        Checkpoint(path).verify()


def _failures(end: Ended) -> list[str]:
    """What a rank said of saves that failed."""
    return [line for line in end.output.splitlines() if "no checkpoint of" in line] + [end.error]


def _unlike(config: Config, reference: Config, refusal: Refusal) -> Iterator[str]:
    """What of a run's end is not as if nothing had been refused. Rows that the disk takes no more
    are lost, and no others."""
    ours, theirs = (
        committed_checkpoints(c.run.directory / "checkpoints")[-1] for c in (config, reference)
    )
    if ours.name != theirs.name:
        yield f"the last checkpoint is {ours.name}"
    for path in theirs.glob("*.safetensors"):
        if (ours / path.name).read_bytes() != path.read_bytes():
            yield f"{path.name} differs"
    rows, wanted = (
        [row for row in losses(c.run.directory) if "failed_save" not in dict(row)]
        for c in (config, reference)
    )
    if refusal.kind == ROW and refusal.lasting:
        wanted = wanted[: refusal.call - 1]
    if rows != wanted:
        yield "the rows differ"


def main() -> int:
    from tests.chaos.__main__ import _data

    parser = argparse.ArgumentParser(prog="python -m tests.chaos.refusals", description=__doc__)
    parser.add_argument("--n", type=int, default=200, help="cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="every case once")
    parser.add_argument("--json", type=Path, help="write the summary there, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="megallama-chaos-") as name:
        folder = Path(name)
        ground = Range(folder, _data(folder / "data"))
        cases = [case for layout in RANKS for case in ground.every(layout)]
        possible = len(cases)
        if not args.all:
            cases = random.Random(args.seed).sample(cases, min(args.n, possible))
        faulty = {}
        for case in cases:
            if faults := ground.faults_of(case):
                faulty[str(case)] = faults
                print(f"FAULTY: {case}", *faults, sep="\n  ", flush=True)
    print(f"{len(cases)} of {possible} refusals, seed {args.seed}: {len(faulty)} faulty")
    if args.json:
        summary = {"seed": args.seed, "cases": len(cases), "possible": possible, "faulty": faulty}
        args.json.write_text(json.dumps(summary, indent=1) + "\n")
    return int(bool(faulty))


if __name__ == "__main__":
    sys.exit(main())
