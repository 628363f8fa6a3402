"""From a config to the objects that train it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megallama.config.load import check_supported
from megallama.config.schema import Config
from megallama.data.dataset import Dataset
from megallama.data.tokenizer import Tokenizer
from megallama.dist.group import SingleGroup
from megallama.model.initial import initialize
from megallama.model.llama import Llama
from megallama.optim.adamw import AdamW
from megallama.parallel.state import ParameterState
from megallama.spec.parameters import parameter_table
from megallama.train.device import DTYPES, choose_device
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
    torch.use_deterministic_algorithms(train.deterministic)
    model = build_model(config, choose_device(train.precision))
    state = model.state
    optimizer = AdamW(config.optimizer, state.table, state.masters, state.gradients)
    step = TrainStep(model, optimizer, train.micro_batch, config.optimizer.grad_clip)
    return Trainer(config, model, optimizer, step)


def build_model(config: Config, device: torch.device) -> Llama:
    """The model with its initial weights."""
    dtype = DTYPES[config.train.precision]
    state = ParameterState(parameter_table(config.model), dtype, device)
    initialize(state, config.run.seed)
    return Llama(config.model, state, SingleGroup(), config.train.saved_activations)


def build_dataset(config: Config) -> Dataset:
    """The run's samples.

    Raises:
        ConfigError: the config names no data, or data that do not fit the model or the tokenizer.
        CorruptError: a token file is damaged.
    """
    data = config.data
    phases = [
        (phase.until_tokens, [(s.name, s.path, s.weight) for s in phase.mixture])
        for phase in data.all_phases
    ]
    tokenizer_hash = Tokenizer(data.tokenizer).hash if data.tokenizer else None
    return Dataset(
        phases,
        config.train.sequence_length,
        config.run.seed,
        config.model.vocab,
        data.mask_documents,
        config.validation.sequences if config.validation.every else 0,
        tokenizer_hash,
    )
