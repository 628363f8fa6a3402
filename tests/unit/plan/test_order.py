"""The planner's steps are those that the real passes issue: every kernel with its sizes, every
collective with its bytes, every wait, in their order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from megallama.config.load import parse_config
from megallama.config.schema import Config
from megallama.plan.chunk import Part
from megallama.plan.ops import Attend, Gemm, Issued, Move, Start, Wait
from megallama.plan.passtimes import issued
from megallama.plan.shape import shape_of
from megallama.spec import logits
from megallama.spec.saved import POLICIES
from megallama.spec.stages import Chunk
from tests.unit.plan.recorded import Entry, RealPasses, log_kernels

KINDS = ("F", "BW", "B", "W", "FB", "B+", "W-")


def config(policy: str, overlap: str, tensor: int, divided: bool = True, **model: int) -> Config:
    sizes = {"d_model": 16, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 24, "vocab": 30}
    return parse_config(
        {
            "model": sizes | model,
            "train": {
                "steps": 1,
                "sequence_length": 8,
                "global_batch": 4,
                "micro_batch": 2,
                "precision": "fp32",
                "saved_activations": policy,
            },
            "parallel": {"tensor": tensor, "overlap": overlap, "sequence_parallel": divided},
            "optimizer": {"lr": 1e-3},
        }
    )


def planned(steps: Sequence[Issued]) -> list[Entry]:
    """As `recorded` logs; plain copies and sums of tensors are PyTorch's and not logged."""
    places: dict[Start, int] = {}
    found: list[Entry] = []
    for step in steps:
        if isinstance(step, Start):
            places[step] = len(places)
            found.append(("start", places[step], step.collective.operation, step.collective.bytes))
        elif isinstance(step, Wait):
            found += [("wait", places.get(each, -1)) for each in step.started]
        elif isinstance(step, Gemm):
            found.append(("gemm", step.m, step.n, step.k))
        elif isinstance(step, Attend):
            found.append((f"attend {step.phase}", step.tokens, step.width))
        elif isinstance(step, Move) and step.share == "embedding":
            found.append(("embedding",))
        elif isinstance(step, Move) and step.share != "plain":
            found.append((step.share, step.bytes))
    return found


def compare(one: Config, part: Part, monkeypatch: pytest.MonkeyPatch, kinds: Sequence[str]) -> None:
    log: list[Entry] = []
    with monkeypatch.context() as patches:
        log_kernels(patches.setattr, log)
        chunk = Chunk(0, range(part.layers), part.embedding, part.head)
        real, shape = RealPasses(one, chunk, log), shape_of(one, "cpu")
        for kind in kinds:
            assert planned(issued(shape, kind, part, part)) == list(real.issued(kind)), kind


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("overlap", ["none", "backward", "full"])
@pytest.mark.parametrize("policy", POLICIES)
def test_layers(policy, overlap, tensor, monkeypatch):
    compare(config(policy, overlap, tensor), Part(2, False, False), monkeypatch, KINDS)


@pytest.mark.parametrize(
    "overlap, tensor", [*itertools.product(["none", "backward", "full"], [2, 4])]
)
def test_without_sequence_parallelism(overlap, tensor, monkeypatch):
    one = config("layer_input", overlap, tensor, divided=False, kv_heads=4)
    compare(one, Part(2, False, False), monkeypatch, KINDS)


@pytest.mark.parametrize("loss_chunks", [1, 3])
@pytest.mark.parametrize("overlap, tensor", [*itertools.product(["none", "full"], [1, 2])])
def test_both_ends_of_the_model(overlap, tensor, loss_chunks, monkeypatch):
    """And with a loss that goes in chunks of tokens."""
    one = config("linear_outputs", overlap, tensor, vocab=31)
    rows = -(-31 // tensor)
    from megallama.autograd import cross_entropy
    from megallama.plan import shape

    budget = {"cpu": -(-16 // loss_chunks) * rows * 4}
    for module in (cross_entropy, shape):
        monkeypatch.setattr(module, "CHUNK_BYTES", budget)
    assert logits.chunk_count(16, rows, 4, budget["cpu"]) == loss_chunks
    compare(one, Part(2, True, True), monkeypatch, ("F", "BW", "B", "W"))
