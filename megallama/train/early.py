"""An update made before the global gradient norm is known, and taken back where that says so.

The norm is a sum over all ranks, and the last stage's backward ends long before the first one's.
Inverting AdamW's arithmetic would leave 4% of the elements changed (fp32), so what it changes is
kept: this data rank's masters and moments, 12 bytes an element under bf16 and fp32.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from megallama.optim.adamw import AdamW
from megallama.parallel.zero import Zero


class EarlyUpdate:
    """One update that may be taken back, bit for bit."""

    def __init__(self, zero: Zero, optimizer: AdamW) -> None:
        self.zero, self.optimizer = zero, optimizer
        self._tensors = list(self._changed())
        self._kept = [torch.empty_like(tensor) for tensor in self._tensors]

    def bytes_held(self) -> int:
        """Bytes of what is kept."""
        return sum(tensor.nbytes for tensor in self._kept)

    def apply(self, lr: float, divisor: Tensor) -> None:
        """Update with the gradients g / `divisor`; the weights are on their way after."""
        torch._foreach_copy_(self._kept, self._tensors)
        with self.zero.changing_weights():
            self.optimizer.step(lr, divisor)

    def take_back(self) -> None:
        """Undo the update. Only while weights may change."""
        torch._foreach_copy_(self._tensors, self._kept)
        self.zero.state.round_masters()
        self.optimizer.updates -= 1

    def _changed(self) -> Iterable[Tensor]:
        state, optimizer = self.zero.state, self.optimizer
        for kind in (state.masters, optimizer.exp_avg, optimizer.exp_avg_sq):
            yield from kind.values()
