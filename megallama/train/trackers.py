"""Experiment tracking that cannot reach the training loop: wandb under Megatron's key names.

The loop puts rows into a bounded queue and a daemon thread feeds them to a backend. A backend that
is missing, fails, hangs or is slow costs one warning line and the rows it did not take, and no time
in the loop.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

Mode = Literal["off", "offline", "online"]

#: Megatron-LM's names for a row's columns: `throughput` is TFLOP/s/GPU, `iteration-time` seconds.
#: Each goes out a second time with " vs samples", to be drawn over the samples consumed.
MEGATRON_KEYS = {
    "loss": "lm loss",
    "grad_norm": "grad-norm",
    "lr": "learning-rate",
    "tflops_per_gpu": "throughput",
    "step_seconds": "iteration-time",
    "validation_loss": "lm loss validation",
}
VS_SAMPLES = " vs samples"
#: Columns that Megatron-LM has no name for.
OWN_KEYS = (
    "tokens",
    "tokens_per_second",
    "tokens_per_second_per_gpu",
    "mfu",
    "mfu_6n",
    "memory_bytes",
    "skipped_steps",
)
#: Losses by source go out as "lm loss/NAME".
PER_SOURCE_KEYS = {
    "loss_per_source": "lm loss",
    "validation_loss_per_source": "lm loss validation",
}
#: How long wandb tries to start, and to upload at the end; its own exit hook keeps to them too, so
#: a server that is gone does not hold the process (and its GPUs) when training is over.
START_SECONDS = 30
FINISH_SECONDS = 8  # below the 10 of `Tracker.close`


class Backend(Protocol):
    """What a tracker feeds."""

    def log(self, values: dict[str, float], step: int) -> None: ...

    def finish(self) -> None: ...


class Tracker:
    """Feeds the backend that `make_backend` returns; with None (mode off) every call does nothing.

    `make_backend`, `log` and `finish` all run in the daemon thread. A row that does not fit the
    queue is dropped and counted in `dropped`; a row that `log` raised on is counted in `failed`.
    `warn` is given the one warning line of the tracker's life.
    """

    def __init__(
        self,
        make_backend: Callable[[], Backend] | None,
        *,
        queue_size: int = 1000,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self.dropped = 0
        self.failed = 0
        self._warn = warn or _to_stderr
        self._warned = threading.Lock()
        self._queue: queue.Queue[tuple[dict[str, float], int] | None] = queue.Queue(queue_size)
        self._off = threading.Event()
        self._thread: threading.Thread | None = None
        if make_backend is None:
            self._off.set()
            return
        self._thread = threading.Thread(
            target=self._feed, args=(make_backend,), name="tracker", daemon=True
        )
        self._thread.start()

    def step(self, row: Mapping[str, Any], samples: int | None = None) -> None:
        """Send a step row of metrics.jsonl; `samples` is the count of samples consumed so far."""
        self._put(row, samples)

    def validation(self, row: Mapping[str, Any], samples: int | None = None) -> None:
        """Send a validation row of metrics.jsonl."""
        self._put(row, samples)

    def close(self, timeout: float = 10.0) -> bool:
        """Send the rows in waiting and finish the backend, or give up after `timeout` seconds.

        Returns whether the tracker ended in time. Rows that come later are ignored.
        """
        self._off.set()
        thread, self._thread = self._thread, None
        if thread is None:
            return True
        deadline = time.monotonic() + timeout
        with suppress(queue.Full):  # full for the whole timeout: the thread hangs, said below
            if thread.is_alive():
                self._queue.put(None, timeout=timeout)
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            self._warn_once(f"did not finish within {timeout:g} s and was left behind")
        return not thread.is_alive()

    def _put(self, row: Mapping[str, Any], samples: int | None) -> None:
        if self._off.is_set():
            return
        try:
            self._queue.put_nowait((tracker_values(row, samples), int(row["step"])))
        except queue.Full:
            self.dropped += 1
            self._warn_once("does not keep up: rows are dropped")

    def _feed(self, make_backend: Callable[[], Backend]) -> None:
        try:
            backend = make_backend()
        except BaseException as error:
            self._off.set()
            self._warn_once(f"is off, it failed to start: {_one_line(error)}")
            return
        while (item := self._queue.get()) is not None:
            try:
                backend.log(*item)
            except BaseException as error:
                self.failed += 1
                self._warn_once(f"failed to log step {item[1]}: {_one_line(error)}")
        try:
            backend.finish()
        except BaseException as error:
            self._warn_once(f"failed to finish: {_one_line(error)}")

    def _warn_once(self, text: str) -> None:
        if self._warned.acquire(blocking=False):
            self._warn(f"warning: the tracker {text}; training goes on")


def tracker_values(row: Mapping[str, Any], samples: int | None = None) -> dict[str, float]:
    """A row of metrics.jsonl under the tracker's names; columns that are null are left out."""
    values: dict[str, float] = {}
    for column, key in MEGATRON_KEYS.items():
        if row.get(column) is not None:
            values[key] = row[column]
            if samples is not None:
                values[key + VS_SAMPLES] = row[column]
    for column, key in PER_SOURCE_KEYS.items():
        for source, loss in (row.get(column) or {}).items():
            if loss is not None:
                values[f"{key}/{source}"] = loss
    values.update({key: row[key] for key in OWN_KEYS if row.get(key) is not None})
    if samples is not None:
        values["samples"] = samples
    return values


def wandb_tracker(
    mode: Mode,
    run_dir: Path | str,
    *,
    project: str = "megallama",
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    warn: Callable[[str], None] | None = None,
) -> Tracker:
    """A tracker that feeds wandb, with wandb's files under RUN_DIR/wandb.

    Online needs WANDB_API_KEY in the environment; no other place is asked for a key.
    """
    if mode == "off":
        return Tracker(None)
    directory = Path(run_dir)
    name = name or directory.name
    return Tracker(partial(_Wandb, mode, directory, project, name, dict(config or {})), warn=warn)


class _Wandb:
    """One wandb run; a resumed training run goes on in the same one."""

    def __init__(
        self,
        mode: Literal["offline", "online"],
        run_dir: Path,
        project: str,
        name: str,
        config: dict[str, Any],
    ) -> None:
        if mode == "online" and not os.environ.get("WANDB_API_KEY"):
            raise RuntimeError("WANDB_API_KEY is not set: export it, or set log.wandb=offline")
        try:
            import wandb
        except ImportError as error:
            raise RuntimeError("wandb is not installed: pip install wandb") from error
        settings = wandb.Settings(
            silent=True, console="off", init_timeout=START_SECONDS, finish_timeout=FINISH_SECONDS
        )
        wandb.setup(settings)  # silent before the run too
        self._run = wandb.init(
            mode=mode,
            dir=str(run_dir),
            project=project,
            name=name,
            id=_run_id(run_dir),
            resume="allow" if mode == "online" else None,
            config=config,
            settings=settings,
        )
        for key in MEGATRON_KEYS.values():
            self._run.define_metric(key + VS_SAMPLES, step_metric="samples")

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def finish(self) -> None:
        import wandb

        self._run.finish()
        # `finish` alone may return before the file is written (wandb 0.31: 1 offline run of 6).
        wandb.teardown()


def _run_id(run_dir: Path) -> str:
    """The wandb id of this run directory, made up at the first start."""
    path = run_dir / "wandb" / "megallama-id"
    if path.exists():
        return path.read_text().strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(uuid.uuid4().hex[:8])
    return path.read_text()


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
