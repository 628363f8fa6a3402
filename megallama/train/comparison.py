"""Two runs side by side: how far apart their losses are, and since when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megallama.errors import ConfigError
from megallama.train.record import RunRecord, column

#: The steps over which runs of one config are the same numbers in another order.
EARLY = 10


@dataclass(frozen=True)
class Comparison:
    """Differences of the losses of steps that both runs have, in nats."""

    other: RunRecord
    early: float
    largest: float
    at_step: int

    def __str__(self) -> str:
        """What was found, and why it grows."""
        return (
            f"loss against {self.other.name}: largest difference over steps 1-{EARLY} "
            f"{self.early:.1e} nats, over all {self.largest:.1e} at step {self.at_step} (layouts "
            "add the same numbers in another order, and training multiplies the difference in "
            "rounding with every step)"
        )

    def figures(self) -> dict[str, Any]:
        """For --json."""
        return {
            "against": self.other.name,
            "largest_early_difference": self.early,
            "largest_difference": self.largest,
        }


def compare(run: RunRecord, other: RunRecord) -> Comparison:
    """The differences of two runs.

    Raises:
        ConfigError: they have none of the first steps in common.
    """
    steps, losses = column(run.steps, "loss")
    other_steps, other_losses = column(other.steps, "loss")
    common, mine, theirs = np.intersect1d(steps, other_steps, return_indices=True)
    differences = np.abs(losses[mine] - other_losses[theirs])
    known = np.isfinite(differences)
    common, differences = common[known], differences[known]
    early = differences[common <= EARLY]
    if not early.size:
        raise ConfigError(
            f"--against: {run.name} and {other.name} have none of steps 1-{EARLY} in common; "
            "compare runs that began at step 1"
        )
    worst = int(differences.argmax())
    return Comparison(other, float(early.max()), float(differences[worst]), int(common[worst]))
