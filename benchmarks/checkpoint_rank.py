"""One rank of `checkpoints.py`: a training rank's state, written and read in several ways.

The state is that of a rank in training: fp32 masters and both moments. megallama writes it as a run
does. torch.distributed.checkpoint is given the same tensors: plain ones in one process, DTensors
sharded by rows over two. The raw copy writes and reads the same bytes as one file a rank.

Every method answers what the parent asks of all ranks at once; a time is from the agreed start.
"""

from __future__ import annotations

import ctypes
import mmap
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as c10d
import torch.distributed.checkpoint as dcp
import xxhash
from pipeline_rank import LOCAL, sleep_until
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from megallama.checkpoint import rank_file
from megallama.checkpoint.store import DISK, Checkpoint, Want, checkpoint_path
from megallama.config.load import parse_config
from megallama.dist.compat import PrefixStore, Store
from megallama.train.bench import batches
from megallama.train.build import build_trainer
from megallama.train.meeting import Meeting
from megallama.train.process import ALONE, Process
from megallama.train.saver import Saver
from megallama.train.snapshot import Progress, rectangles, snapshot, write_snapshot

#: Bytes of one read of the raw copy: a block of megallama's files.
BLOCK = rank_file.BLOCK_BYTES
LR = 1e-4
NO_DATA = SimpleNamespace(tokenizer_hash=None, fingerprints={})


class Rank:
    """`folder`: where everything is written."""

    def __init__(
        self, config: Mapping[str, Any], folder: str, rank: int, size: int, store: Store
    ) -> None:
        self.rank, self.folder = rank, Path(folder)
        c10d.init_process_group("gloo", store=PrefixStore("dcp", store), rank=rank, world_size=size)
        own = PrefixStore("megallama", store)
        process = Process(rank, size, rank, size, own, LOCAL) if size > 1 else ALONE
        run = parse_config(dict(config))
        self.trainer = build_trainer(run, process)
        self.batch = batches(run, None, self.trainer.place)(0)
        self.progress = Progress()
        self.meeting = Meeting(process, "benchmark")
        self.saver = Saver(self.trainer, NO_DATA, self.meeting, None)
        self.step()  # moments are zeros until then
        self.theirs = self._for_dcp(size)
        # Its copy in host memory is kept from save to save, as megallama's is.
        options = dict.fromkeys(StagingOptions.__dataclass_fields__, False)
        self.stager = DefaultStager(StagingOptions(**options))

    def size_bytes(self, at: float) -> int:
        """Of this rank's state."""
        return sum(r.data.nbytes for r in rectangles(self.trainer))

    # Saves, each into an empty folder

    def save(self, way: str, at: float) -> float:
        """Save by one of `SAVES`; until this rank is done."""
        save = SAVES[way]
        sleep_until(at)
        save(self)
        return time.monotonic() - at

    def clean(self, at: float) -> None:
        """Delete what there is."""
        if self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)

    def write_raw(self, read_back: bool = False) -> None:
        views = [rank_file._bytes(r.data) for r in rectangles(self.trainer)]
        path = self.raw_path
        DISK.write_new(path, views)
        if read_back:
            forget(path)
            self.read_raw()

    def write_megallama(self) -> None:
        state = snapshot(self.trainer, self.progress, NO_DATA)
        write_snapshot(state, self.folder, self.meeting, DISK)

    def write_without_reading_back(self) -> None:
        """A rank's file alone: no meeting, no manifest."""
        rank_file.write_rank_file(self.raw_path, rectangles(self.trainer), DISK)

    def write_dcp(self) -> None:
        dcp.save(self.theirs, checkpoint_id=self.folder / "dcp")

    # Loads, of what the last save left

    def load(self, way: str, at: float) -> float:
        """Load by one of `LOADS`; until this rank is done."""
        load = LOADS[way]
        sleep_until(at)
        load(self)
        return time.monotonic() - at

    def forget(self, at: float) -> float:
        """Ask the system to drop the files' pages; the share of them that is left."""
        paths = [path for path in self.folder.rglob("*") if path.is_file() and path.stat().st_size]
        for path in paths:
            forget(path)
        left = [resident(path) for path in paths]
        return sum(a for a, _ in left) / max(1, sum(b for _, b in left))

    def read_raw(self) -> None:
        buffer = memoryview(bytearray(BLOCK))
        with DISK.reading(self.raw_path) as descriptor:
            offset = 0
            while count := DISK.read_into(descriptor, buffer, offset):
                offset += count

    def read_megallama(self) -> None:
        checkpoint = Checkpoint(checkpoint_path(self.folder, self.progress.step))
        with self.trainer.zero.changing_masters():
            checkpoint.fill(self.wants(), near=self.rank)

    def read_dcp(self) -> None:
        dcp.load(self.theirs, checkpoint_id=self.folder / "dcp")

    def brings_back(self, way: str, at: float) -> bool:
        """Whether loading restores every bit of the state, once it is gone."""
        views = [r.data for r in rectangles(self.trainer)]
        if way == "dcp":
            views = [x.to_local() if isinstance(x, DTensor) else x for x in self.theirs.values()]
        copies = [view.clone() for view in views]
        for view in views:
            view.fill_(-1)
        LOADS[way](self)
        return all(torch.equal(a, b) for a, b in zip(views, copies, strict=True))

    # Saves behind the steps

    def step(self) -> None:
        result = self.trainer.step.run(self.batch, LR)
        assert result.applied, result.fault

    def steps(self, way: str, count: int, at: float) -> tuple[float, float, float]:
        """`count` steps with a save begun before them: seconds of its start, of all of them, and
        until it was done as well. `way` is `none`, or one of `BEHIND`."""
        sleep_until(at)
        wait = BEHIND[way](self) if way in BEHIND else lambda: None
        held = time.monotonic() - at
        for _ in range(count):
            self.step()
        stepped = time.monotonic() - at
        wait()
        return held, stepped, time.monotonic() - at

    def start_megallama(self) -> Callable[[], None]:
        self.progress.step += 1
        self.saver.start(self.progress)
        return self._finish

    def start_dcp(self) -> Callable[[], None]:
        future = dcp.async_save(
            self.theirs, checkpoint_id=self.folder / "dcp", async_stager=self.stager
        )
        return lambda: future.result() and None

    def start_dcp_by_default(self) -> Callable[[], None]:
        future = dcp.async_save(self.theirs, checkpoint_id=self.folder / "dcp")
        return lambda: future.result() and None

    def close(self) -> None:
        self.trainer.groups.close()
        c10d.destroy_process_group()

    def _finish(self) -> None:
        self.saver.finish()
        for ended in self.saver.ended():
            if ended.error:
                raise ended.error

    @property
    def raw_path(self) -> Path:
        return self.folder / f"raw-{self.rank}"

    def wants(self) -> Iterator[Want]:
        for r in rectangles(self.trainer):
            region = [slice(a, a + n) for a, n in zip(r.start, r.data.shape, strict=True)]
            yield Want(r.name, tuple(region), r.data)

    def _for_dcp(self, size: int) -> dict[str, Tensor]:
        """A copy of the state as dcp has it: every parameter's rows are shared.

        A copy, because a DTensor of a view cannot be staged (torch 2.13).
        """
        optimizer = self.trainer.optimizer
        kinds = {"master": self.trainer.model.state.masters}
        kinds |= {"exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq}
        mesh = init_device_mesh("cpu", (size,)) if size > 1 else None

        def whole(rows: Tensor) -> Tensor:
            return rows if mesh is None else DTensor.from_local(rows, mesh, [Shard(0)])

        return {
            f"{kind}/{name}": whole(rows.clone())
            for kind, named in kinds.items()
            for name, rows in named.items()
        }


@contextmanager
def without_hashes() -> Iterator[None]:
    """No byte of a tensor is hashed, and every slice is taken for intact."""
    with patch.object(xxhash, "xxh3_64_hexdigest", lambda data: 16 * "0"):
        yield


def _unhashed(do: Callable[[Rank], None], rank: Rank) -> None:
    with without_hashes():
        do(rank)


SAVES: dict[str, Callable[[Rank], None]] = {
    "raw": Rank.write_raw,
    "raw, read back": partial(Rank.write_raw, read_back=True),
    "megallama": Rank.write_megallama,
    "megallama without hashes": partial(_unhashed, Rank.write_megallama),
    "megallama, not read back": Rank.write_without_reading_back,
    "dcp": Rank.write_dcp,
}
#: By way: which of `SAVES` leaves what it loads.
LOADED_FROM = {
    "raw": "raw",
    "megallama": "megallama",
    "megallama without hashes": "megallama without hashes",
    "dcp": "dcp",
}
LOADS: dict[str, Callable[[Rank], None]] = {
    "raw": Rank.read_raw,
    "megallama": Rank.read_megallama,
    "megallama without hashes": partial(_unhashed, Rank.read_megallama),
    "dcp": Rank.read_dcp,
}
BEHIND: dict[str, Callable[[Rank], Callable[[], None]]] = {
    "megallama": Rank.start_megallama,
    "dcp": Rank.start_dcp,
    "dcp by default": Rank.start_dcp_by_default,
}


def forget(path: Path) -> None:
    """Ask that a synced file's pages leave memory."""
    with DISK.reading(path) as descriptor:
        DISK.forget(descriptor)


def resident(path: Path) -> tuple[int, int]:
    """Pages of a file that are in memory, and all of them."""
    with (
        DISK.reading(path) as descriptor,
        mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY) as view,
    ):
        seen = (ctypes.c_ubyte * -(-len(view) // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(view)
        ctypes.CDLL(None).mincore(ctypes.byref(first), ctypes.c_size_t(len(view)), seen)
        del first  # else the mapping cannot be closed
    return sum(byte & 1 for byte in seen), len(seen)
