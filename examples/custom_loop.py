"""The Python API: train with a loop of your own.

    python examples/custom_loop.py [CONFIG] [section.key=value …]

`megallama train` adds what a long job needs: resuming, signals, metrics and validation. Here are
the parts that it is made of: a config, the samples, a trainer, a step, a checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

from megallama.config.load import load_config
from megallama.errors import UserError
from megallama.optim.schedule import learning_rate
from megallama.train.build import build_dataset, build_trainer
from megallama.train.meeting import Meeting
from megallama.train.process import ALONE
from megallama.train.snapshot import Progress, save


def main(path: str = "configs/cpu-tiny.yaml", *overrides: str) -> Path:
    """Train the config's steps; return the directory of the checkpoint."""
    config = load_config(path, ["run.name=custom-loop", *overrides])
    dataset = build_dataset(config)
    trainer = build_trainer(config)
    progress = Progress()
    batch_size, steps = config.train.global_batch, config.train.total_steps

    while progress.step < steps:
        batch = dataset.batch(progress.samples, batch_size)
        lr = learning_rate(config.optimizer, progress.step + 1, steps)
        result = trainer.step.run(batch, lr)
        progress.step += 1
        progress.samples += batch_size
        progress.tokens += result.tokens
        progress.updates += result.applied
        print(f"step {progress.step}: loss {result.loss:.4f}, gradient norm {result.grad_norm:.3f}")

    folder = config.run.directory / "checkpoints"
    return save(trainer, progress, folder, dataset, Meeting(ALONE))


if __name__ == "__main__":
    try:
        print(f"saved {main(*sys.argv[1:])}; try: megallama generate CHECKPOINT --prompt 'def '")
    except UserError as error:
        sys.exit(f"error: {error}")
