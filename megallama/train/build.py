"""From a config to the objects that train it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megallama.config.load import check_supported
from megallama.config.schema import Config
from megallama.data.dataset import Dataset
from megallama.data.tokenizer import Tokenizer
from megallama.dist.group import SingleGroup
from megallama.errors import ConfigError
from megallama.model.initial import initialize
from megallama.model.llama import Llama
from megallama.optim.adamw import AdamW
from megallama.parallel.state import ParameterState
from megallama.spec.parameters import parameter_table
from megallama.train.device import DTYPES, choose_device, make_deterministic
from megallama.train.step import TrainStep


@dataclass(frozen=True)
class Trainer:
    """A model, its optimizer and its step."""

    config: Config
    model: Llama
    optimizer: AdamW
    step: TrainStep

    @property
    def device(self) -> torch.device:
        return self.model.state.flat_weights.device

    @property
    def parameters(self) -> int:
        return self.model.state.flat_masters.numel()


def build_trainer(config: Config) -> Trainer:
    """Everything of a run but its data, with initial weights.

    Raises:
        ConfigError: the config asks for what this version or this machine does not run.
    """
    check_supported(config)
    train = config.train
    if train.deterministic:
        make_deterministic()
    model = build_model(config, choose_device(config))
    state = model.state
    optimizer = AdamW(config.optimizer, state.table, state.masters, state.gradients)
    step = TrainStep(model, optimizer, train.micro_batch, config.optimizer.grad_clip)
    return Trainer(config, model, optimizer, step)


def build_model(config: Config, device: torch.device) -> Llama:
    """The model with its initial weights."""
    dtype = DTYPES[config.train.precision]
    table = parameter_table(config.model)
    state = ParameterState(table, dtype, device, tied=config.model.tie_embeddings)
    initialize(state, config.run.seed)
    return Llama(config.model, state, SingleGroup(), config.train.saved_activations)


def build_dataset(config: Config) -> Dataset:
    """The run's samples.

    Raises:
        ConfigError: the config names no data, or data that do not fit the model or the tokenizer.
        CorruptError: a token file is damaged.
    """
    data = config.data
    if data.is_empty:
        raise ConfigError(
            "data.mixture: is empty, and so is data.phases; name the token files to train on, "
            "as configs/cpu-tiny.yaml does"
        )
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
