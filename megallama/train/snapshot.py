"""Between a trainer and a checkpoint: what is saved, what is restored, and from where.

The whole state is the masters, the moments, and a few counters. Weights follow from the masters,
data order and initial weights from the config, so there is no random state to save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from pathlib import Path

from torch import Tensor

from megallama.checkpoint.folder import NAME
from megallama.checkpoint.manifest import MANIFEST, Manifest
from megallama.checkpoint.rank_file import Rectangle
from megallama.checkpoint.store import (
    DISK,
    Checkpoint,
    Want,
    begin_checkpoint,
    checkpoint_path,
    commit_checkpoint,
    committed_checkpoints,
    delete_checkpoint,
    write_rank,
)
from megallama.checkpoint.weights import MASTER
from megallama.config.changes import Kind, changes, refuse_changes
from megallama.config.schema import Config
from megallama.data.dataset import Dataset
from megallama.errors import ConfigError, CorruptError, LostError, UserError
from megallama.files import Disk
from megallama.model.llama import Llama
from megallama.parallel.zero import Zero
from megallama.train.build import Trainer
from megallama.train.meeting import Meeting

#: Bytes set aside for the header of a rank's file, more than it takes at 80 layers.
HEADER_BYTES = 1 << 19


@dataclass
class Progress:
    """The counters of a run. `samples` is the data cursor: samples consumed, whatever the batch.

    `updates` counts optimizer updates, `skipped` the steps that a non-finite value or a batch
    without a valid token left out, `failures` the non-finite ones in a row.

    Of the loss-spike guard (`spikes`): `losses` of the last updates, the ranges of samples that it
    skipped, each [first, end), and how often it went back. `samples` counts what was skipped too.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    updates: int = 0
    skipped: int = 0
    failures: int = 0
    losses: list[float] = field(default_factory=list)
    skips: list[list[int]] = field(default_factory=list)
    rewinds: int = 0


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes of a step: its rectangles, and what the manifest says beside tensors.

    `bytes`: about what all ranks' files take.
    """

    step: int
    rectangles: Sequence[Rectangle]
    facts: Manifest
    bytes: int


def snapshot(trainer: Trainer, progress: Progress, dataset: Dataset) -> Snapshot:
    """This step's state as it is: the rectangles are views, which the next update changes."""
    config = trainer.config.model_dump(mode="json")
    facts = Manifest(asdict(progress), config, dataset.tokenizer_hash, dataset.fingerprints)
    state = 3 * trainer.parameters * trainer.model.state.wide.itemsize
    headers = HEADER_BYTES * trainer.place.grid.size
    return Snapshot(progress.step, rectangles(trainer), facts, state + headers)


def save(
    trainer: Trainer,
    progress: Progress,
    folder: Path,
    dataset: Dataset,
    meeting: Meeting,
    disk: Disk = DISK,
) -> Path:
    """Save a checkpoint of this step under `folder`, every rank what it owns.

    One of this step that is there already, such as a damaged one, is overwritten.

    Raises:
        ConfigError: a rank's disk refuses; other checkpoints are untouched.
    """
    return write_snapshot(snapshot(trainer, progress, dataset), folder, meeting, disk)


def write_snapshot(
    state: Snapshot,
    folder: Path,
    meeting: Meeting,
    disk: Disk,
    may_write: Callable[[], None] = lambda: None,
) -> Path:
    """What `save` does, of a snapshot; every rank returns or raises alike.

    `may_write`: rank 0 calls it before it makes, commits or deletes anything; it raises ConfigError
    where another job has taken the run over, who may be saving the same step.
    """
    directory = checkpoint_path(folder, state.step)

    def begin() -> str:
        if meeting.leads:
            may_write()
            begin_checkpoint(directory, state.bytes, disk)
        return ""

    def write() -> str:
        return write_rank(directory, meeting.process.rank, state.rectangles, disk)

    def commit(ranks: Sequence[str]) -> str:
        commit_checkpoint(directory, ranks, state.facts, disk, may_write)
        return ""

    meeting.hold(begin)
    try:
        meeting.hold(write, commit)
    except UserError as error:
        # Nobody writes any more, unless a rank is lost: what there is takes room on a full disk.
        if meeting.leads and not isinstance(error, LostError):
            with suppress(OSError, ConfigError):
                may_write()
                delete_checkpoint(directory, disk)
        raise
    return directory


def restore(trainer: Trainer, checkpoint: Checkpoint, dataset: Dataset) -> Progress:
    """Fill the trainer from a checkpoint of any layout.

    Raises:
        ConfigError: it is of another model, precision, tokenizer or order of data.
        CorruptError: it is damaged.
    """
    with trainer.zero.changing_masters():
        return read_state(trainer, checkpoint, dataset)


def read_state(trainer: Trainer, checkpoint: Checkpoint, dataset: Dataset) -> Progress:
    """What `restore` does, inside `changing_masters`: no other rank is needed, or told.

    After an error the trainer may have parts of two states, and is to be filled from another.
    """
    progress = progress_of(checkpoint)
    _refuse_other_name(checkpoint, progress.step)
    _refuse_other_run(trainer.config, checkpoint)
    _refuse_other_data(trainer.config, checkpoint, dataset)
    checkpoint.fill(_wants(trainer), near=trainer.place.rank)
    trainer.optimizer.updates = progress.updates
    return progress


def restore_weights(model: Llama, zero: Zero, checkpoint: Checkpoint) -> None:
    """Fill a model's weights alone."""
    with zero.changing_masters():
        checkpoint.fill(
            Want(f"{MASTER}/{piece.part.name}", piece.region, tensor)
            for piece, tensor in model.state.pieces(model.state.masters)
        )


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: its own directory, or a run's, whose newest is meant."""
    if committed := committed_checkpoints(path / "checkpoints"):
        return Checkpoint(committed[-1])
    if path.is_dir() and not (path / MANIFEST).exists():
        raise ConfigError(f"{path}: neither a checkpoint nor a run with one; check the path")
    return Checkpoint(path)


def _kinds(trainer: Trainer) -> dict[str, Mapping[str, Tensor]]:
    """This rank's rows of all that is saved, by kind and parameter."""
    optimizer = trainer.optimizer
    return {
        MASTER: trainer.model.state.masters,
        "exp_avg": optimizer.exp_avg,
        "exp_avg_sq": optimizer.exp_avg_sq,
    }


def rectangles(trainer: Trainer) -> list[Rectangle]:
    """The rectangles that this rank writes: views of its state."""
    return [
        Rectangle(f"{kind}/{piece.part.name}", piece.part.shape, piece.start, tensor)
        for kind, tensors in _kinds(trainer).items()
        for piece, tensor in trainer.model.state.pieces(tensors)
        if piece.owned
    ]


def _wants(trainer: Trainer) -> Iterator[Want]:
    """All that this rank reads, into its own tensors."""
    for kind, tensors in _kinds(trainer).items():
        for piece, tensor in trainer.model.state.pieces(tensors):
            yield Want(f"{kind}/{piece.part.name}", piece.region, tensor)


def progress_of(checkpoint: Checkpoint) -> Progress:
    """The counters of a checkpoint. Raises CorruptError where they are none of a run's."""
    state = checkpoint.manifest.state
    sound = {key.name: _is_count for key in fields(Progress)} | {
        "losses": lambda value: isinstance(value, list) and all(map(_is_loss, value)),
        "skips": lambda value: isinstance(value, list) and all(map(_is_range, value)),
    }
    if not all(name in sound and sound[name](value) for name, value in state.items()):
        raise CorruptError(f"{checkpoint.directory}: its counters are no run's; use another")
    return Progress(**state)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_loss(value: object) -> bool:
    return isinstance(value, float) and isfinite(value)


def _is_range(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(map(_is_count, value))
        and value[0] < value[1]
    )


def _refuse_other_name(checkpoint: Checkpoint, step: int) -> None:
    """A copy with a later step's name: a run finds its newest by name, and each start would go back
    to this one. Names that are not of that form are free."""
    directory = checkpoint.directory
    name = checkpoint_path(directory.parent, step).name
    if NAME.fullmatch(directory.name) and directory.name != name:
        raise CorruptError(f"{directory}: has the state of step {step}; rename it to {name}")


def _refuse_other_run(config: Config, checkpoint: Checkpoint) -> None:
    """What never changes in a run. What needs permission `changed_keys` sees to."""
    facts = checkpoint.manifest
    samples = progress_of(checkpoint).samples
    try:
        length = facts.config["train"]["sequence_length"]
        found = changes(facts.config, config.model_dump(mode="json"), samples)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CorruptError(f"{checkpoint.directory}: its config is no run's; use another") from None
    never = [change for change in found if change.kind is Kind.NEVER]
    refuse_changes(never, (), checkpoint.directory, samples * length)


def _refuse_other_data(config: Config, checkpoint: Checkpoint, dataset: Dataset) -> None:
    """The files that the config names may have been built anew since."""
    manifest = checkpoint.manifest
    if manifest.tokenizer_hash != dataset.tokenizer_hash:
        raise ConfigError(
            f"data.tokenizer: {config.data.tokenizer} has hash {dataset.tokenizer_hash}, but "
            f"{checkpoint.directory} was trained with {manifest.tokenizer_hash}; restore that file "
            "and its data"
        )
    for name, now in dataset.fingerprints.items():
        if manifest.sources.get(name, now) != now:  # one that is not there is a new phase's
            raise ConfigError(
                f"data source {name!r}: its token files have changed ({now}) since "
                f"{checkpoint.directory} was saved ({manifest.sources[name]}), and so would "
                "the order of samples; restore them, or choose another run.name to start anew"
            )
