"""`megallama` commands, each in a process of its own with its own output, environment and signals.

They are forked by a server that has torch: importing it takes seconds each time.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from megallama.train.metrics import Row, read_metrics
from tests.conftest import LENGTH, VOCAB, TinyData

#: The longest that a command may take. It ends hangs only: a busy machine is far below it.
LIMIT = 120.0
CONTEXT = multiprocessing.get_context("forkserver")
# numpy.ma takes 0.15 s where it is needed first, which is in every rank.
CONTEXT.set_forkserver_preload(["megallama.train.job", "megallama.train.launch", "numpy.ma"])


class Ended(NamedTuple):
    """How a command ended: its exit code (negative: a signal's number) and what it printed."""

    code: int
    output: str
    error: str


class Command:
    """`megallama WORDS`, started in `folder`, where its output goes too.

    `variables` are added to its environment.
    """

    def __init__(
        self, folder: Path, words: Sequence[str], variables: Mapping[str, str] | None = None
    ) -> None:
        self.folder, self.words = folder, [str(word) for word in words]
        folder.mkdir(parents=True, exist_ok=True)
        environment = {"OMP_NUM_THREADS": "1", **(variables or {})}
        self.process = CONTEXT.Process(target=_run, args=(str(folder), self.words, environment))
        self.process.start()

    @property
    def running(self) -> bool:
        return self.process.exitcode is None

    def stop(self, number: signal.Signals, worker: int | None = None) -> list[int]:
        """Send a signal to the command, or to a worker of it; returns its workers."""
        workers = children(self.process.pid or 0)
        with suppress(ProcessLookupError, IndexError):  # it ended: `end` tells how
            os.kill((self.process.pid or 0) if worker is None else workers[worker], number)
        return workers

    def end(self, limit: float = LIMIT) -> Ended:
        """How it ended: as killed, and its workers with it, where it took longer than `limit`."""
        self.process.join(limit)
        self.kill()
        assert self.process.exitcode is not None
        return Ended(self.process.exitcode, *self._texts())

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def _texts(self) -> tuple[str, str]:
        output, error = (
            path.read_text() if path.exists() else ""
            for path in (self.folder / "output", self.folder / "error")
        )
        return output, error


def _run(folder: str, words: list[str], environment: dict[str, str]) -> None:
    """The process of a command: what the `megallama` script does, and no more."""
    code = 1
    gc.freeze()  # a collection would touch, and so copy, every page that the server shares
    try:
        for number, stream in ((1, "output"), (2, "error")):
            os.dup2(os.open(Path(folder, stream), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.environ.update(environment)
        os.chdir(folder)
        torch.set_num_threads(1)  # the server has read OMP_NUM_THREADS before
        from megallama.cli.main import main

        code = main(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def children(parent: int) -> list[int]:
    """The processes that have this parent and still run, by number."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, its_parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it ended meanwhile
            continue
        if int(its_parent) == parent and state != "Z":
            found.append(int(path.parent.name))
    return sorted(found)


def runs(pid: int) -> bool:
    """Whether the process runs; one that nobody collects yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def steps(run: Path) -> list[Row]:
    """A run's step rows so far."""
    metrics = run / "metrics.jsonl"
    return [row for row in read_metrics(metrics) if "loss" in row] if metrics.exists() else []


def last_step(run: Path) -> int:
    return len(steps(run))


def write_config(folder: Path, data: TinyData, **sections: Mapping[str, Any]) -> Path:
    """A tiny config whose runs go to `folder`/runs; `sections` are changed in it.

    The rate is constant: the length of a run decides no step of it.
    """
    config: dict[str, dict[str, Any]] = {
        "run": {"root": str(folder / "runs")},
        "model": {"d_model": 16, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 24, "vocab": VOCAB},
        "train": {
            "steps": 1_000_000,
            "sequence_length": LENGTH,
            "global_batch": 4,
            "precision": "fp64",
        },
        "optimizer": {"lr": 0.003, "warmup_steps": 2, "schedule": "constant"},
        "data": {
            "tokenizer": str(data.tokenizer),
            "mixture": [
                {"name": name, "path": str(prefix), "weight": weight}
                for weight, (name, prefix) in enumerate(data.prefixes.items(), 1)
            ],
        },
        "validation": {"every": 2, "sequences": 5},
        "checkpoint": {"every": 3, "keep": 3},
    }
    for section, changes in sections.items():
        config.setdefault(section, {}).update(changes)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
