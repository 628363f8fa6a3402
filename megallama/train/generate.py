"""Greedy continuation of a prompt, to see what a checkpoint has learned.

Every token is predicted from the whole text before it, through the training forward itself: slow
and simple. Serving is another system's job.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megallama.autograd.passes import drive
from megallama.checkpoint.store import Checkpoint
from megallama.checkpoint.weights import checkpoint_config
from megallama.config.schema import Config
from megallama.data.tokenizer import Tokenizer
from megallama.errors import ConfigError
from megallama.train.build import build_lone_model
from megallama.train.device import choose_device
from megallama.train.failures import explained_loss, is_shortage
from megallama.train.host import read_back
from megallama.train.process import ALONE
from megallama.train.snapshot import find_checkpoint, restore_weights


def generate(path: Path, prompt: str, count: int) -> str:
    """The prompt and up to `count` tokens more, ending early at the end of the document.

    Raises:
        ConfigError: the checkpoint names no tokenizer, or another than it was trained with; or the
            memory does not suffice.
        CorruptError: the checkpoint is damaged.
        LostError: the GPU failed.
    """
    checkpoint = find_checkpoint(path)
    config = checkpoint_config(checkpoint)
    if config.data.tokenizer is None:
        raise ConfigError(f"{path}: trained without data.tokenizer, so it cannot read a prompt")
    beside = checkpoint.directory / "tokenizer.model"  # a converted one's; it may have moved
    tokenizer = Tokenizer(beside if beside.exists() else config.data.tokenizer)
    if tokenizer.hash != checkpoint.manifest.tokenizer_hash:
        raise ConfigError(
            f"{tokenizer.path}: not the tokenizer that {path} was trained with; restore that one"
        )
    tokens = [tokenizer.bos, *tokenizer.encode(prompt)]
    device = choose_device(config)
    try:
        with explained_loss(ALONE):
            tokens = _continued(checkpoint, config, device, tokenizer, tokens, count)
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        elsewhere = "CUDA_VISIBLE_DEVICES= takes the CPU's, or " if device.type == "cuda" else ""
        raise ConfigError(
            f"{path}: {device} has no memory left for this model; {elsewhere}use a larger machine"
        ) from error
    return tokenizer.decode(tokens[1:])


def _continued(
    checkpoint: Checkpoint,
    config: Config,
    device: torch.device,
    tokenizer: Tokenizer,
    tokens: list[int],
    count: int,
) -> list[int]:
    """`tokens` and what the model takes for their continuation."""
    model, zero = build_lone_model(config, device)
    restore_weights(model, zero, checkpoint)
    for _ in range(count):
        window = torch.tensor(tokens[-config.train.sequence_length :], device=device)
        logits_TV = drive(model.logits(window, model.positions([[len(window)]])))
        # Ids beyond the tokenizer's are padding of the vocabulary and mean nothing.
        likeliest = logits_TV[-1:, : tokenizer.vocab_size].argmax(1)
        token = int(read_back(likeliest)[0][0])
        if token == tokenizer.eos:
            break
        tokens = [*tokens, token]
    return tokens
