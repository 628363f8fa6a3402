"""Handles, the group of one process, and what is arithmetic in the groups of more."""

from __future__ import annotations

import pytest
import torch

from megallama.dist.group import Blocking, SingleGroup
from megallama.dist.handle import Done, Joined
from megallama.dist.parcels import ALONE, parcels
from megallama.dist.sums import room_bytes, sum_in_order
from megallama.dist.traffic import Count, Traffic


def test_collectives_of_one_are_their_operand():
    group, x = SingleGroup("tensor"), torch.randn(3, 2)
    assert (group.name, group.rank, group.size) == ("tensor", 0, 1)
    assert group.all_gather(x).wait() is x
    assert group.reduce_scatter(x, torch.bfloat16).wait() is x
    out = torch.zeros(3, 2)
    assert group.all_gather(x, out).wait() is out
    assert torch.equal(out, x)


def test_an_all_reduce_of_one_is_a_new_tensor():
    x = torch.randn(3)
    total = SingleGroup().all_reduce(x).wait()
    assert torch.equal(total, x)
    assert total.data_ptr() != x.data_ptr()


def test_rows_of_one_stay_as_they_are():
    x = torch.randn(3, 2)
    kept = x.clone()
    assert SingleGroup().all_gather_rows([x]).wait() is None
    assert SingleGroup().reduce_scatter_rows([x], torch.bfloat16).wait() is None
    assert torch.equal(x, kept)


def test_one_has_nobody_to_talk_to():
    for group in (SingleGroup("pipe"), Blocking(SingleGroup("pipe"))):
        with pytest.raises(ValueError, match="'pipe'"):
            group.send(torch.zeros(1), 0, "activations")
        with pytest.raises(ValueError, match="'pipe'"):
            group.receive(torch.zeros(1), 0, "activations")


def test_done_has_its_value():
    assert Done(5).wait() == 5
    assert Done(5).cover == 0


def test_joined_waits_for_all_in_order_and_covers_as_the_largest():
    class Counting:
        def __init__(self, cover: int) -> None:
            self.cover = cover

        def wait(self) -> None:
            waited.append(self.cover)

    waited: list[int] = []
    joined = Joined([Counting(1), Counting(2), Counting(0)], "value")
    assert joined.cover == 2
    assert waited == []
    assert joined.wait() == "value"
    assert waited == [1, 2, 0]
    assert Joined([], 1).cover == 0


def room_for(parts: list[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    return torch.empty(room_bytes(parts[0].dtype, out, len(parts)), dtype=torch.uint8)


@pytest.mark.parametrize("part, out, needed", [(16, 16, 40), (16, 32, 40), (32, 32, 0), (64, 64, 0)])
def test_two_parts_need_room_only_to_be_widened(part, out, needed):
    dtypes = {16: torch.bfloat16, 32: torch.float32, 64: torch.float64}
    result = torch.empty(10, dtype=dtypes[out])
    assert room_bytes(dtypes[part], result, 2) == needed
    parts = [torch.arange(10.0).to(dtypes[part]) for _ in range(2)]
    sum_in_order(parts, 2, result, torch.empty(needed, dtype=torch.uint8))
    assert torch.equal(result, torch.arange(0, 20, 2).to(dtypes[out]))


@pytest.mark.parametrize("own", [0, 1, 2])
def test_a_sum_may_land_on_any_of_its_parts(own):
    """(2^24 + 1) - 2^24 is 0 in fp32, added from left to right."""
    parts = [torch.tensor([v]) for v in (2.0**24, 1.0, -(2.0**24))]
    kept = [part.clone() for part in parts]
    sum_in_order(parts, 3, parts[own], room_for(parts, parts[own]))
    assert parts[own].item() == 0
    assert all(
        torch.equal(p, k) for i, (p, k) in enumerate(zip(parts, kept, strict=True)) if i != own
    )


def test_bf16_is_added_in_fp32_and_rounded_once():
    parts = [torch.tensor([v], dtype=torch.bfloat16) for v in (256.0, 1.0, 1.0)]
    out = torch.empty(1, dtype=torch.bfloat16)
    sum_in_order(parts, 3, out, room_for(parts, out))
    assert out.item() == 258


def test_large_tensors_travel_from_where_they_lie():
    large, small = (
        torch.randn(2, ALONE // 4),
        [torch.randn(4, 2), torch.randn(2), torch.ones(2).double()],
    )
    loads = parcels([small[0], large, *small[1:]], 2)
    assert [len(load.views) for load in loads] == [1, 2, 1]
    assert loads[0].packed().data_ptr() == large.data_ptr()
    packed = loads[1].packed()
    assert torch.equal(packed[1], torch.cat([small[0][2:].flatten(), small[1][1:]]))
    loads[1].unpack(torch.zeros(5), 1)
    assert small[0][2:].abs().sum() == small[1][1] == 0
    assert small[1][0] != 0
    assert parcels([large], 2, torch.bfloat16)[0].packed().dtype == torch.bfloat16


def test_traffic_adds_up():
    traffic = Traffic()
    traffic.add("data", "all_gather", 5)
    traffic.add("data", "all_gather", 6)
    assert traffic.counts == {("data", "all_gather"): Count(2, 11)}
