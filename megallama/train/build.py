"""From a config and a process's place to the objects that train it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch

from megallama.config.schema import Config, Parallel
from megallama.data.dataset import Dataset
from megallama.data.tokenizer import Tokenizer
from megallama.dist.connect import Groups, connect
from megallama.dist.group import Blocking, Group
from megallama.errors import ConfigError
from megallama.model.initial import initialize
from megallama.model.llama import Llama
from megallama.optim.adamw import AdamW
from megallama.parallel.pipeline import Pipeline
from megallama.parallel.state import ParameterState
from megallama.parallel.tokens import TokenShards
from megallama.parallel.zero import Zero, ZeroGroups
from megallama.spec import grid
from megallama.spec.grid import Place, make_grid
from megallama.spec.groups import group_members, link_name, run_schedule
from megallama.spec.parameters import EMBEDDING, OUTPUT, parameter_table
from megallama.spec.schedules.actions import Schedule
from megallama.spec.schedules.build import forward_only
from megallama.spec.stages import Chunk, rank_tables
from megallama.train.device import DTYPES, choose_device, make_deterministic
from megallama.train.process import ALONE, Process
from megallama.train.step import Pipelines, TrainStep

NO_DATA = (
    "data.mixture: is empty, and so is data.phases; name the token files to train on, as "
    "configs/cpu-tiny.yaml does"
)


@dataclass(frozen=True)
class Trainer:
    """A rank's model, its optimizer and its step."""

    config: Config
    place: Place
    groups: Groups
    model: Llama
    zero: Zero
    optimizer: AdamW
    step: TrainStep

    @property
    def device(self) -> torch.device:
        return self.model.state.device

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return sum(parameter.numel for parameter in parameter_table(self.config.model))


def build_trainer(config: Config, process: Process = ALONE, strict: bool = False) -> Trainer:
    """Everything of a run but its data, with initial weights.

    `strict` has the groups compare every operation before it runs (tests, on gloo).

    Raises:
        ConfigError: the config asks for what this job's processes or this machine do not run.
        LostError: another process does not answer.
    """
    place = Place(make_grid(config, process.size), process.rank)
    schedule = run_schedule(config, place.grid)
    if config.train.deterministic:
        make_deterministic()
    device = choose_device(config, process.local_rank)
    groups = connect(
        process.store,
        process.rank,
        group_members(config, place, schedule.links),
        device,
        strict=strict,
        timeout=timedelta(seconds=config.parallel.timeout_seconds),
        hostname=process.hostname,
    )
    return assemble(config, place, device, groups)


def assemble(config: Config, place: Place, device: torch.device, groups: Groups) -> Trainer:
    """A rank's trainer over groups that are there.

    On the meta device it has no values: what a step does is all there, what it computes is not.
    """
    model, zero = build_model(config, device, place, groups.by_name)
    state = model.state
    optimizer = AdamW(config.optimizer, state)
    pipelines = build_pipelines(config, place, groups)
    step = TrainStep(model, zero, optimizer, groups.by_name, place, pipelines, config)
    return Trainer(config, place, groups, model, zero, optimizer, step)


def build_model(
    config: Config, device: torch.device, place: Place, groups: Mapping[str, Group]
) -> tuple[Llama, Zero]:
    """A rank's share of the model, with its initial weights."""
    parallel = config.parallel
    if parallel.overlap == "none":
        groups = {name: Blocking(group) for name, group in groups.items()}
    tensor = groups["tensor"]
    tables = rank_tables(config, place)
    chunks = [chunk for chunk, _ in tables]
    dtype = DTYPES[config.train.precision]
    table = [shard for _, shards in tables for shard in shards]
    ends = _tied_ends(chunks) if config.model.tie_embeddings else ()
    state = ParameterState(table, dtype, device, ends)
    summed = tensor if parallel.sequence_parallel else None
    wire = torch.bfloat16 if parallel.gradient_wire == "bf16" else None
    names = {chunk.index: {shard.name for shard in shards} for chunk, shards in tables}
    zero_groups = ZeroGroups(groups["data"], summed, groups["key_value"], groups.get("tied"))
    zero = Zero(state, zero_groups, wire, names)
    with zero.changing_masters():
        if device.type != "meta":
            initialize(state, config.run.seed)
    tokens = TokenShards(tensor, parallel.sequence_parallel, parallel.forward_chunks)
    return Llama(config.model, state, tokens, config.train.saved_activations, chunks), zero


def _tied_ends(chunks: Sequence[Chunk]) -> tuple[str, ...]:
    """Which ends of the model these chunks have."""
    ends = {EMBEDDING: any(c.embedding for c in chunks), OUTPUT: any(c.head for c in chunks)}
    return tuple(name for name, here in ends.items() if here)


def build_pipelines(config: Config, place: Place, groups: Groups) -> Pipelines:
    """A rank's pipelines over its links."""
    rank = place.along("pipeline")
    links = {
        (source, destination): groups[link_name(source, destination)]
        for source, destination in run_schedule(config, place.grid).links
        if rank in (source, destination)
    }
    overlap = config.parallel.overlap != "none"
    fill = overlap and place.grid.tensor > 1

    def pipeline(schedule: Schedule) -> Pipeline:
        return Pipeline(schedule, rank, links, overlap, fill, groups.recorder)

    def training(micro_batches: int) -> Pipeline:
        return pipeline(run_schedule(config, place.grid, micro_batches))

    def evaluation(micro_batches: int) -> Pipeline:
        return pipeline(forward_only(run_schedule(config, place.grid, micro_batches)))

    return Pipelines(cache(training), cache(evaluation))


def build_lone_model(config: Config, device: torch.device) -> tuple[Llama, Zero]:
    """The whole model in this process, whatever layout the config names."""
    config = config.model_copy(update={"parallel": Parallel()})
    members = grid.ALONE.groups(config.model.kv_heads)
    return build_model(config, device, grid.ALONE, connect(None, 0, members, device).by_name)


def build_dataset(config: Config) -> Dataset:
    """The run's samples.

    Raises:
        ConfigError: the config names no data, or data that do not fit the model or the tokenizer.
        CorruptError: a token file is damaged.
    """
    data = config.data
    if data.is_empty:
        raise ConfigError(NO_DATA)
    phases = [
        (phase.until_tokens, [(s.name, s.path, s.weight) for s in phase.mixture])
        for phase in data.all_phases
    ]
    tokenizer_hash = None
    if data.tokenizer:
        tokenizer = Tokenizer(data.tokenizer)
        tokenizer_hash = tokenizer.hash
        if tokenizer.vocab_size > config.model.vocab:
            raise ConfigError(
                f"model.vocab={config.model.vocab}: {data.tokenizer} has {tokenizer.vocab_size} "
                "tokens; raise model.vocab to that or more"
            )
    dataset = Dataset(
        phases,
        config.train.sequence_length,
        config.run.seed,
        config.model.vocab,
        data.mask_documents,
        config.validation.sequences if config.validation.every else 0,
        tokenizer_hash,
    )
    _check_length(config, dataset.order.end)
    return dataset


def _check_length(config: Config, end: int | None) -> None:
    """Refuse a run longer than data whose last phase ends with sample `end`."""
    samples = config.train.total_steps * config.train.global_batch
    length = config.train.sequence_length
    if end is not None and end < samples:
        raise ConfigError(
            f"data.phases: the last one's until_tokens ends them at {end * length:,} tokens, but "
            f"the run takes {samples * length:,}; raise it, or leave it out"
        )
