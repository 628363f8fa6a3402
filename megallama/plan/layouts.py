"""Every layout that a number of devices allows for a run, as configs that training would take.

Each axis has the values worth trying, and the config's own checks refuse what does not fit
together, so nothing is said twice. Configs are copied, not parsed: a search makes thousands.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, get_args

from megallama.config.checks import cross_check
from megallama.config.schedules import VIRTUAL_STAGES
from megallama.config.schema import Config, Parallel, Train

#: More sequences in a micro-batch make no GEMM of a published shape faster.
MOST_SEQUENCES = 16
#: More chunks a rank send more messages than their shorter bubble saves.
MOST_CHUNKS = 8
POLICIES: tuple[str, ...] = get_args(Train.model_fields["saved_activations"].annotation)
OVERLAPS: tuple[str, ...] = get_args(Parallel.model_fields["overlap"].annotation)


@dataclass(frozen=True)
class Layout:
    """The values that a search chooses, and the config that has them."""

    tensor: int
    pipeline: int
    data: int
    schedule: str
    virtual_stages: int
    micro_batch: int
    policy: str
    overlap: str
    config: Config


def layouts(
    config: Config, devices: int, node: int, fixed: Collection[str] = ()
) -> Iterator[Layout]:
    """All layouts of `config` on `devices`, `node` of them to a node.

    Keys in `fixed` keep their values. Tensor ranks stay inside a node: their collectives stand
    between the GEMMs of every layer. gpipe is left out: it takes 1f1b's time and more memory.
    """
    space = _Space(config, frozenset(fixed))
    for tensor, pipeline in product(
        space.values("parallel.tensor", _divisors(node)),
        space.values("parallel.pipeline", range(1, config.model.layers + 1)),
    ):
        data, rest = divmod(devices, tensor * pipeline)
        if rest or data not in space.values("parallel.data", [data]):
            continue
        sequences = space.values("train.micro_batch", _micro_batches(config, data))
        for micro_batch, overlap in product(sequences, _overlaps(space, tensor)):
            count = config.train.global_batch // (data * micro_batch)
            for schedule, chunks in _schedules(space, pipeline, count):
                shape = tensor, pipeline, data, schedule, chunks, micro_batch
                if space.allows(shape, overlap):
                    for policy in space.values("train.saved_activations", POLICIES):
                        yield space.layout(shape, policy, overlap)


_Shape = tuple[int, int, int, str, int, int]


class _Space:
    """The config that is varied, as values that the checks take and as sections to copy."""

    def __init__(self, config: Config, fixed: frozenset[str]) -> None:
        self.config, self.fixed = config, fixed
        self.known = {
            f"{section}.{key}": getattr(getattr(config, section), key)
            for section, model in Config.model_fields.items()
            for key in model.annotation.model_fields  # type: ignore[union-attr]
        }

    def values(self, key: str, tried: Any) -> list[Any]:
        """What a key may be: its own value where it is fixed and given."""
        own = self.known[key]
        return [own] if key in self.fixed and own is not None else list(tried)

    def allows(self, shape: _Shape, overlap: str) -> bool:
        """Whether the config's own checks do."""
        changed = {f"parallel.{key}": v for key, v in self._parallel(shape, overlap).items()}
        known = self.known | changed | {"train.micro_batch": shape[-1]}
        return next(iter(cross_check(known)), None) is None

    def layout(self, shape: _Shape, policy: str, overlap: str) -> Layout:
        train = {"micro_batch": shape[-1], "saved_activations": policy}
        sections = {
            "parallel": self.config.parallel.model_copy(update=self._parallel(shape, overlap)),
            "train": self.config.train.model_copy(update=train),
        }
        return Layout(*shape, policy, overlap, self.config.model_copy(update=sections))

    def _parallel(self, shape: _Shape, overlap: str) -> dict[str, Any]:
        """A list of each chunk's layers is kept where it has one for every chunk."""
        tensor, pipeline, data, schedule, chunks, _ = shape
        split = self.config.parallel.stage_layers
        if not isinstance(split, str) and len(split) != pipeline * chunks:
            split = "cost"
        return {
            "tensor": tensor,
            "pipeline": pipeline,
            "data": data,
            "schedule": schedule,
            "virtual_stages": chunks,
            "stage_layers": split,
            "overlap": overlap,
        }


def _schedules(space: _Space, pipeline: int, micro_batches: int) -> Iterator[tuple[str, int]]:
    """(name, chunks a rank). With one rank there is no bubble to shorten, with one micro-batch none
    that hides another's communication."""
    tried = [name for name in VIRTUAL_STAGES if name != "gpipe"]
    if pipeline == 1:
        tried = ["1f1b", "1f1b-fused"] if micro_batches > 1 else ["1f1b"]
    for name in space.values("parallel.schedule", tried):
        takes = VIRTUAL_STAGES[name]
        own = [takes] if takes else _chunk_counts(space.config.model.layers, pipeline)
        for chunks in space.values("parallel.virtual_stages", own):
            yield name, chunks


def _chunk_counts(layers: int, pipeline: int) -> list[int]:
    """Counts above 1, each with a largest chunk of at most two thirds of the one before's."""
    found: list[int] = []
    size = -(-layers // pipeline)
    for chunks in range(2, min(MOST_CHUNKS, layers // pipeline) + 1):
        largest = -(-layers // (pipeline * chunks))
        if 3 * largest <= 2 * size:
            found, size = [*found, chunks], largest
    return found


def _overlaps(space: _Space, tensor: int) -> list[str]:
    """With one tensor rank there is nothing to take a forward in two chunks for."""
    names = [name for name in OVERLAPS if tensor > 1 or name != "full"]
    return space.values("parallel.overlap", names)


def _micro_batches(config: Config, data: int) -> list[int]:
    sequences, rest = divmod(config.train.global_batch, data)
    return [] if rest else [n for n in _divisors(sequences) if n <= MOST_SEQUENCES]


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
