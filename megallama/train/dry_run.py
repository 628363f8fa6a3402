"""`train --dry-run`: everything a run needs, checked and shown, without training."""

from __future__ import annotations

from megallama.config.schema import Config
from megallama.data.tokenizer import Tokenizer
from megallama.errors import EXIT_DONE
from megallama.spec.parameters import parameter_table
from megallama.spec.saved import saved_bytes_per_token
from megallama.train.build import build_dataset
from megallama.train.device import DTYPES, choose_device

MIB = 1 << 20


def dry_run(config: Config) -> int:
    """Validate the config and its data, show the first batch and the memory that a run takes.

    Raises:
        UserError: as training would.
    """
    device = choose_device(config.train.precision)
    dataset = build_dataset(config)
    batch = dataset.batch(0, config.train.global_batch)
    tokens = config.train.total_steps * batch.tokens_NS.size
    print(f"run: {config.train.total_steps:,} steps, {tokens:,} tokens, on {device}")
    for name, epochs in dataset.order.epochs(tokens // config.train.sequence_length).items():
        print(f"source {name}: {epochs:.2f} epochs")
    if config.data.tokenizer:
        text = Tokenizer(config.data.tokenizer).decode(batch.tokens_NS[0].tolist())
        print(f"first sample: {text[:200]!r}")
    for name, size in memory(config).items():
        print(f"{name}: {size / MIB:,.1f} MiB")
    return EXIT_DONE


def memory(config: Config) -> dict[str, int]:
    """Bytes of what a run holds on one process: parameter buffers, moments, saved activations."""
    table = parameter_table(config.model)
    parameters = sum(parameter.numel for parameter in table)
    itemsize = DTYPES[config.train.precision].itemsize
    wide = max(itemsize, 4)
    tied = table[0].numel if config.model.tie_embeddings else 0
    tokens = config.train.micro_batch * config.train.sequence_length
    a_token = saved_bytes_per_token(config.model, config.train.saved_activations, itemsize)
    sizes = {
        "masters": parameters * wide,
        "weights": parameters * itemsize if itemsize < wide else 0,
        "gradients": (parameters + tied) * wide,
        "moments": 2 * parameters * wide,
        "saved activations": config.model.layers * tokens * a_token,
    }
    return {**sizes, "all of these": sum(sizes.values())}
