"""The NCCL group's calls, made on a gloo backend: without GPUs this holds all but NCCL itself."""

from __future__ import annotations

from datetime import timedelta

import torch
from torch.distributed import Store

from megallama.dist.compat import gloo_backend
from megallama.dist.nccl import NcclGroup
from megallama.dist.traffic import Traffic
from tests.dist.processes import LOCAL, run_on


def test_the_calls_do_what_the_group_promises():
    def body(rank: int, store: Store) -> None:
        backend = gloo_backend(store, rank, 2, timedelta(seconds=60), LOCAL)
        group = NcclGroup(backend, "all", rank, 2, Traffic())
        mine = torch.arange(8.0).view(4, 2) + rank  # the sum is 2·arange + 1
        total = 2 * torch.arange(8.0).view(4, 2) + 1
        rows = slice(2 * rank, 2 * rank + 2)

        both = torch.cat([torch.arange(8.0).view(4, 2) + r for r in range(2)])
        out = torch.empty(8, 2)
        assert torch.equal(group.all_gather(mine).wait(), both)
        assert group.all_gather(mine.t().contiguous().t(), out).wait() is out
        assert torch.equal(out, both)

        assert torch.equal(group.reduce_scatter(mine).wait(), total[rows])
        assert torch.equal(group.reduce_scatter(mine, torch.bfloat16).wait(), total[rows])
        assert torch.equal(group.all_reduce(mine).wait(), total)
        assert group.all_reduce(torch.tensor(1.0)).wait() == 2

        filled = [torch.zeros(4, 2), torch.zeros(2)]
        filled[0][rows], filled[1][rank] = total[rows], 1.0
        assert group.all_gather_rows(filled).wait() is None
        assert torch.equal(filled[0], total)
        assert torch.equal(filled[1], torch.ones(2))

        for wire in (None, torch.bfloat16):
            summed = [mine.clone(), torch.ones(2), torch.ones(2, dtype=torch.float64)]
            assert group.reduce_scatter_rows(summed, wire).wait() is None
            assert torch.equal(summed[0][rows], total[rows])
            assert summed[1][rank] == summed[2][rank] == 2

        if rank == 0:
            group.send(total.t(), 1, "t").wait()
        else:
            assert torch.equal(group.receive(torch.empty(2, 4), 0, "t").wait(), total.t())
        group.close()

    run_on(2, body)


def test_a_wire_dtype_rounds_every_part_once_and_adds_in_fp32():
    def body(rank: int, store: Store) -> None:
        backend = gloo_backend(store, rank, 3, timedelta(seconds=60), LOCAL)
        group = NcclGroup(backend, "all", rank, 3, Traffic())
        coarse = torch.full((3,), (256 if rank == 0 else 1) * (1 + 2.0**-10))
        group.reduce_scatter_rows([coarse], torch.bfloat16).wait()
        assert coarse[rank] == 258

    run_on(3, body)
