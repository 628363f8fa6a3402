"""What `bench` reports: its keys are read by scripts."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from torch.distributed import Store

from megallama.errors import DivergedError
from megallama.spec.flops import flops_per_token
from megallama.spec.grid import ALONE
from megallama.train.bench import _of_all_ranks, batches, bench, bench_layouts
from megallama.train.build import build_dataset, build_trainer
from megallama.train.process import Process
from megallama.train.tally import Tally
from tests.conftest import MakeConfig
from tests.dist.processes import LOCAL, run_on

SYNTHETIC = {"data": None}


@pytest.mark.parametrize("changes", [{}, SYNTHETIC], ids=["real", "synthetic"])
def test_the_keys_are_those_that_scripts_read(
    make_config: MakeConfig, changes: dict[str, Any]
) -> None:
    config = make_config(changes)
    figures = json.loads(json.dumps(bench(config, steps=3, warmup=1), allow_nan=False))
    assert {
        *("tokens_per_second", "tokens_per_second_per_gpu", "step_seconds", "tflops_per_gpu"),
        *("mfu", "mfu_6n", "peak_memory_bytes", "exposed_seconds", "parameters"),
        *("layout", "device", "versions"),
    } <= figures.keys()
    assert "memory_bytes" not in figures
    seconds = figures["step_seconds"]
    assert set(seconds) == {"min", "median", "max"}
    assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
    assert figures["mfu"] is None
    assert figures["mfu_6n"] is None
    assert figures["exposed_seconds"] == {}, "nobody to wait for"
    rate = 4 * 32 / seconds["median"]
    assert figures["tokens_per_second"] == pytest.approx(rate)
    assert figures["tokens_per_second_per_gpu"] == pytest.approx(rate)
    per_token = flops_per_token(config.model, 32)
    assert figures["tflops_per_gpu"] == pytest.approx(rate * per_token / 1e12)
    assert figures["data"] == ("synthetic" if changes else "real")
    assert figures["layout"] == {"tensor": 1, "pipeline": 1, "data": 1}
    # Embedding (tied); q and o, k and v, w1 w2 w3 and two norms in each layer; the last norm.
    a_layer = 2 * 16 * 16 + 2 * 8 * 16 + 3 * 16 * 24 + 2 * 16
    assert figures["parameters"] == 300 * 16 + 2 * a_layer + 16
    assert {"torch", "megallama", "python"} <= figures["versions"].keys()
    assert not config.run.directory.exists()


def test_it_times_the_steps_after_the_warm_up(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megallama.train import bench as module

    clock = iter(range(100))
    durations = iter([50.0, 40.0, 3.0, 1.0, 2.0])

    def timed(trainer: object, batch: object, step: int) -> float:
        assert step == next(clock) + 1
        return next(durations)

    monkeypatch.setattr(module, "_timed_step", timed)
    figures = bench(make_config(SYNTHETIC), steps=3, warmup=2)
    assert figures["step_seconds"] == {"min": 1.0, "median": 2.0, "max": 3.0}
    assert next(clock) == 5


def test_synthetic_batches_are_tokens_of_the_vocabulary(make_config: MakeConfig) -> None:
    batch_of = batches(make_config(SYNTHETIC), None, ALONE)
    first, again, other = batch_of(0), batch_of(0), batch_of(1)
    assert first.tokens_NS.shape == first.labels_NS.shape == (4, 32)
    assert np.array_equal(first.tokens_NS, again.tokens_NS)
    assert not np.array_equal(first.tokens_NS, other.tokens_NS)
    assert np.array_equal(first.tokens_NS[:, 1:], first.labels_NS[:, :-1])
    assert first.tokens_NS.min() >= 0
    assert first.tokens_NS.max() < 300
    trainer = build_trainer(make_config(SYNTHETIC))
    assert trainer.step.run(first, 0.01).applied


def test_real_batches_are_those_of_training(make_config: MakeConfig) -> None:
    config = make_config()
    dataset = build_dataset(config)
    batch_of = batches(config, dataset, ALONE)
    for step in range(3):
        assert np.array_equal(batch_of(step).tokens_NS, dataset.batch(4 * step, 4).tokens_NS)


def test_a_step_that_is_left_out_is_not_timed(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tally, "_fault", lambda *_: "loss is nan")
    with pytest.raises(DivergedError, match="step 1 was left out"):
        bench(make_config(SYNTHETIC), steps=1, warmup=0)


def test_layouts_are_timed_in_one_job_each_with_its_own_groups(make_config: MakeConfig) -> None:
    base = SYNTHETIC | {"train.micro_batch": 1, "train.global_batch": 2}
    configs = [make_config(base | {f"parallel.{axis}": 2}) for axis in ("tensor", "pipeline")]

    def body(rank: int, store: Store) -> list[dict[str, Any]]:
        return bench_layouts(configs, 2, 0, Process(rank, 2, rank, 2, store, LOCAL))

    first, second = run_on(2, body)
    assert [row["layout"]["tensor"] for row in first] == [2, 1]
    assert [row["layout"]["pipeline"] for row in first] == [1, 2]
    tensor, pipeline = (row["exposed_seconds"] for row in first)
    assert tensor.keys() == {"tensor", "world"}
    assert pipeline.keys() == {"pipeline 0>1", "pipeline 1>0", "tied", "world"}
    assert all(seconds >= 0 for row in (tensor, pipeline) for seconds in row.values())
    for mine, other in zip(first, second, strict=True):
        assert mine["exposed_seconds"] == other["exposed_seconds"], "one figure for all ranks"


def test_a_wait_is_the_mean_over_ranks_and_memory_the_largest() -> None:
    ranks = [
        {"memory": 5, "exposed": {"tensor": 3.0, "data": 1.0}},
        {"memory": 7, "exposed": {"tensor": 1.0}},
    ]
    assert json.loads(_of_all_ranks([json.dumps(rank) for rank in ranks])) == {
        "memory": 7,
        "exposed": {"tensor": 2.0, "data": 0.5},
    }
    on_nccl = json.dumps({"memory": 1, "exposed": None})
    assert json.loads(_of_all_ranks([on_nccl, on_nccl]))["exposed"] is None
