"""The group of one process."""

from __future__ import annotations

import torch

from megallama.dist.group import SingleGroup
from megallama.dist.handle import Done


def test_collectives_of_one_are_their_operand():
    group, x = SingleGroup(), torch.randn(3, 2)
    assert (group.rank, group.size) == (0, 1)
    assert group.all_gather(x).wait() is x
    assert group.reduce_scatter(x).wait() is x


def test_done_has_its_value():
    assert Done(5).wait() == 5
