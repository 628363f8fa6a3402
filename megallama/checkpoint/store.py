"""Save a checkpoint directory, and delete the ones that a run has; `folder` finds them, `reader`
loads them.

Tensors go to safetensors files, one a rank, under `kind/name` (`master/norm.weight`); no pickle is
written or read.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from megallama.checkpoint.claims import join, pack, unpack
from megallama.checkpoint.folder import checkpoint_directories
from megallama.checkpoint.folder import checkpoint_path as checkpoint_path  # part of this face
from megallama.checkpoint.folder import committed_checkpoints as committed_checkpoints
from megallama.checkpoint.manifest import MANIFEST, Manifest, holds, read_manifest, write_manifest
from megallama.checkpoint.rank_file import Rectangle as Rectangle
from megallama.checkpoint.rank_file import write_rank_file
from megallama.checkpoint.reader import DISK as DISK
from megallama.checkpoint.reader import Checkpoint as Checkpoint
from megallama.checkpoint.reader import Want as Want
from megallama.checkpoint.reader import check_header, opened, read_slice, refuse_gaps
from megallama.errors import ConfigError, CorruptError
from megallama.files import Disk, refuse_os_errors


def begin_checkpoint(directory: Path, room: int = 0, disk: Disk = DISK) -> None:
    """Make the directory; one rank does it, before any writes.

    What is there, such as an unfinished or damaged checkpoint, is deleted. `room`: bytes that the
    checkpoint will take.

    Raises:
        ConfigError: the disk refuses, or has less room; other checkpoints are untouched.
    """
    with refuse_os_errors("write", directory):
        delete_checkpoint(directory, disk)
        disk.make(directory.parent)
        free = disk.free_bytes(directory.parent)
        if free < room:
            raise ConfigError(
                f"cannot write {directory}: it takes {room / 2**30:.2f} GiB and the disk has "
                f"{free / 2**30:.2f} GiB; free some, or lower checkpoint.keep"
            )
        disk.make(directory)


def write_rank(
    directory: Path, rank: int, rectangles: Sequence[Rectangle], disk: Disk = DISK
) -> str:
    """Write, sync and read back a rank's file; the text returned is for `commit_checkpoint`.

    Raises:
        ConfigError: the disk refuses (no space, no permission).
        CorruptError: what the disk has is not what was written.
    """
    if not rectangles:
        return ""
    path = directory / f"rank-{rank:05d}.safetensors"
    with refuse_os_errors("write", path):
        file = write_rank_file(path, rectangles, disk)
    with opened(path, file, disk) as (descriptor, table):
        disk.forget(descriptor)
        for name in table:
            for piece in table[name].slices(path.name):
                read_slice(path, name, piece, descriptor, disk)
    return pack(file, table)


def commit_checkpoint(
    directory: Path,
    ranks: Iterable[str],
    facts: Manifest,
    disk: Disk = DISK,
    may_write: Callable[[], None] = lambda: None,
) -> None:
    """Make the written files a checkpoint: it exists once this returns and not before.

    `ranks` are what `write_rank` returned; `facts` is the manifest but for its tensors and files.
    `may_write` is called last before the manifest is written: what it raises prevents that.

    Raises:
        ConfigError: the disk refuses.
        CorruptError: the files are not as written, or do not hold every element of their tensors
            once.
    """
    claims = [unpack(text) for text in ranks if text]
    for claim in claims:
        check_header(directory / claim.file.name, claim.file, disk)
    tensors, tilings, names = join(directory, claims)
    refuse_gaps(directory, tilings)
    held = {text: holds(tensors, set(listed)) for text, listed in names.items()}
    files = tuple(replace(claim.file, holds=held[claim.tensors]) for claim in claims)
    manifest = replace(facts, tensors=tensors, files=files)
    may_write()
    with refuse_os_errors("write", directory / MANIFEST):
        disk.sync_names(directory)
        write_manifest(directory, manifest, disk)
    if read_manifest(directory, disk) != _as_json(manifest):
        raise CorruptError(f"{directory / MANIFEST}: the disk has other bytes than were written")


def prune_checkpoints(
    folder: Path, keep: int, newest: Path, keep_every: int = 0, disk: Disk = DISK
) -> None:
    """Delete all but the last `keep` finished checkpoints up to `newest`, which was just saved.

    Those of steps that are multiples of `keep_every` stay (0: none does). Unfinished ones before
    `newest` go too. Those after it stay: they are damaged, or the run would have begun from them,
    and are overwritten when it gets there.

    Raises:
        ConfigError: the system refuses.
    """
    finished = [path for path in committed_checkpoints(folder) if path <= newest]
    kept = {*finished[-keep:]}
    if keep_every:
        kept |= {path for path in finished if int(path.name[5:]) % keep_every == 0}
    with refuse_os_errors("delete old checkpoints in", folder):
        for directory in checkpoint_directories(folder):
            if directory < newest and directory not in kept:
                delete_checkpoint(directory, disk)


def delete_checkpoint(directory: Path, disk: Disk = DISK) -> None:
    """Delete a checkpoint, its manifest first: a kill midway leaves an unfinished one.

    Raises OSError.
    """
    if not directory.is_dir():
        return
    if (directory / MANIFEST).exists():
        disk.unlink(directory / MANIFEST)
        disk.sync_names(directory)  # or a power failure might leave the manifest alone
    for path in sorted(directory.iterdir()):
        if path.is_symlink() or not path.is_dir():
            disk.unlink(path)
    try:
        disk.rmdir(directory)
    except OSError as error:  # what is not ours stays, and so does an open file's name on NFS
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    disk.sync_names(directory.parent)


def _as_json(manifest: Manifest) -> Manifest:
    """As it is once it was read: state and config may have tuples for lists."""
    state, config = (json.loads(json.dumps(part)) for part in (manifest.state, manifest.config))
    return replace(manifest, state=state, config=config)
