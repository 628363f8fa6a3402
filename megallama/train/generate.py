"""Greedy continuation of a prompt, to see what a checkpoint has learned.

Every token is predicted from the whole text before it, through the training forward itself: slow
and simple. Serving is another system's job.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megallama.autograd.passes import drive
from megallama.checkpoint.weights import checkpoint_config
from megallama.data.tokenizer import Tokenizer
from megallama.errors import ConfigError
from megallama.train.build import build_lone_model
from megallama.train.device import choose_device
from megallama.train.host import read_back
from megallama.train.snapshot import find_checkpoint, restore_weights


def generate(path: Path, prompt: str, count: int) -> str:
    """The prompt and up to `count` tokens more, ending early at the end of the document.

    Raises:
        ConfigError: the checkpoint names no tokenizer, or another than it was trained with.
        CorruptError: the checkpoint is damaged.
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
    device = choose_device(config)
    model, zero = build_lone_model(config, device)
    restore_weights(model, zero, checkpoint)
    tokens = [tokenizer.bos, *tokenizer.encode(prompt)]
    for _ in range(count):
        window = torch.tensor(tokens[-config.train.sequence_length :], device=device)
        logits_TV = drive(model.logits(window, model.positions([[len(window)]])))
        # Ids beyond the tokenizer's are padding of the vocabulary and mean nothing.
        likeliest = logits_TV[-1:, : tokenizer.vocab_size].argmax(1)
        token = int(read_back(likeliest)[0][0])
        if token == tokenizer.eos:
            break
        tokens.append(token)
    return tokenizer.decode(tokens[1:])
