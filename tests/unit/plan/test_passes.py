"""The steps of the passes against `spec`'s formulas: FLOPs and collectives. That they are the real
passes' own: `test_order.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from megallama.plan.chunk import Part
from megallama.plan.ops import Attend, Gemm, Issued, Start
from megallama.plan.passtimes import PassTimes, issued
from megallama.plan.shape import shape_of
from megallama.plan.streams import run
from megallama.spec.collectives import Count
from megallama.spec.flops import head_flops, layer_flops
from megallama.spec.logits import CHUNK_BYTES, chunk_count
from megallama.spec.saved import POLICIES
from megallama.spec.shards import vocab_rows
from megallama.spec.stages import Chunk
from megallama.spec.traffic import chunk_pass, stream_of
from tests.unit.plan.machines import A100, config

LAYERS = 3
WHOLE = Part(LAYERS, embedding=True, head=True)


def useful_flops(steps: Sequence[Issued]) -> float:
    """A flash backward makes the scores again: 5 products of which 4 count."""
    products = sum(s.flops for s in steps if isinstance(s, Gemm) and not s.again)
    attention = [s for s in steps if isinstance(s, Attend) and not s.again]
    return products + sum(a.flops * (0.8 if a.phase == "backward" else 1) for a in attention)


@pytest.mark.parametrize("tensor", [1, 4])
@pytest.mark.parametrize("overlap", ["backward", "full"])
@pytest.mark.parametrize("policy", POLICIES)
def test_flops_of_forward_and_backward(policy, overlap, tensor):
    one = config(
        "llama3-8b",
        train__saved_activations=policy,
        parallel__overlap=overlap,
        parallel__tensor=tensor,
    )
    shape = shape_of(one, "cuda")
    joined = [*issued(shape, "F", WHOLE, WHOLE), *issued(shape, "BW", WHOLE, WHOLE)]
    split = [s for kind in ("F", "B", "W") for s in issued(shape, kind, WHOLE, WHOLE)]
    each = LAYERS * layer_flops(one.model, 2048) + head_flops(one.model)
    assert useful_flops(joined) == pytest.approx(2048 * each / tensor, rel=1e-12)
    assert useful_flops(split) == pytest.approx(useful_flops(joined), rel=1e-12)


@pytest.mark.parametrize("divided", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("overlap", ["none", "backward", "full"])
def test_collectives_are_those_of_the_traffic(policy, overlap, divided):
    one = config(
        "llama2-70b",
        train__saved_activations=policy,
        parallel__overlap=overlap,
        parallel__tensor=8,
        parallel__sequence_parallel=divided,
        train__micro_batch=2,
    )
    shape, stream = shape_of(one, "cpu"), stream_of(one)
    loss = chunk_count(stream.tokens, vocab_rows(32000, 8), 2, CHUNK_BYTES["cpu"])
    for part in (WHOLE, Part(2, False, False)):
        chunk = Chunk(0, range(part.layers), part.embedding, part.head)
        for kind in ("F", "BW", "B", "W"):
            counts: Counter[tuple[str, str]] = Counter()
            sizes: Counter[tuple[str, str]] = Counter()
            for step in issued(shape, kind, part, part):
                if isinstance(step, Start):
                    key = step.collective.group, step.collective.operation
                    counts[key] += 1
                    sizes[key] += step.collective.bytes
            found = {key: Count(counts[key], sizes[key]) for key in counts}
            assert found == dict(chunk_pass(kind, chunk, stream, policy, loss).counts), kind


@pytest.mark.parametrize("overlap", ["none", "backward", "full"])
@pytest.mark.parametrize("kind", ["F", "BW", "B", "W", "FB", "B+", "W-"])
def test_many_layers_are_few_and_more_of_the_same(kind, overlap):
    one = config("llama-65b", parallel__tensor=8, parallel__overlap=overlap)
    shape, part, times = shape_of(one, "cuda"), Part(20, True, True), PassTimes(A100, "bf16")
    whole = run(issued(shape, kind, part, part), times.costs)
    found = times.timing(shape, kind, part, part)
    assert found.compute == pytest.approx(whole.compute, rel=1e-9, abs=1e-9)
    assert found.seconds == pytest.approx(whole.seconds, rel=0.005, abs=1e-4)
