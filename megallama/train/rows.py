"""What a run says of a step: a row of metrics.jsonl, whose columns are listed in `metrics`."""

from __future__ import annotations

from megallama.data.dataset import Dataset
from megallama.train.build import Trainer
from megallama.train.metrics import Row
from megallama.train.snapshot import Progress
from megallama.train.tally import StepResult
from megallama.train.throughput import speed


def step_row(
    trainer: Trainer,
    dataset: Dataset,
    progress: Progress,
    result: StepResult,
    lr: float,
    seconds: float,
) -> Row:
    """The row of the step that `progress` counted last, which took `seconds`."""
    row = {
        "step": progress.step,
        "tokens": progress.tokens,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": lr,
        "step_seconds": seconds,
        **speed(trainer, result.tokens, seconds),
    }
    names = dataset.source_names
    if trainer.config.log.per_source:
        row["loss_per_source"] = {names[s]: loss for s, loss in result.source_losses.items()}
        row["epochs"] = dataset.order.epochs(progress.samples)
    if result.layer_norms:
        row["layer_norms"] = vars(result.layer_norms)
    if progress.skipped:
        row["skipped_steps"] = progress.skipped
    return row
