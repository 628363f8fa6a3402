"""`--dry-run` checks everything, shows the first batch, trains nothing and writes nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megallama.data.tokenizer import Tokenizer
from megallama.errors import ConfigError
from megallama.spec.grid import Grid
from megallama.spec.memory import held_bytes
from megallama.train.build import build_dataset, build_trainer
from megallama.train.dry_run import dry_run
from megallama.train.step import TrainStep
from tests.conftest import MakeConfig
from tests.reference import parameter_shapes


def test_it_shows_the_run_and_writes_nothing(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("a dry run trains nothing")

    monkeypatch.setattr(TrainStep, "run", never)
    config = make_config()
    assert dry_run(config) == 0
    out = capsys.readouterr().out
    assert "6 steps, 768 tokens" in out
    parameters = sum(math.prod(s) for s in parameter_shapes(config.model).values())
    assert f"parameters: {parameters:,}\n" in out
    assert not config.run.root.exists()
    dataset = build_dataset(config)
    for name, epochs in dataset.order.epochs(24).items():
        assert f"source {name}: {epochs:.2f} epochs" in out
    tokens = dataset.batch(0, 1).tokens_NS[0].tolist()
    assert repr(Tokenizer(config.data.tokenizer).decode(tokens)[:200]) in out


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("tied", [False, True])
def test_its_memory_is_that_of_the_buffers(
    make_config: MakeConfig, precision: str, tied: bool
) -> None:
    config = make_config({"train.precision": precision, "model.tie_embeddings": tied})
    sizes = held_bytes(config, Grid())
    trainer = build_trainer(config)
    held = trainer.model.state.bytes_held()
    assert {name: sizes[name] for name in held} == held
    moments = (*trainer.optimizer.exp_avg.values(), *trainer.optimizer.exp_avg_sq.values())
    assert sizes["moments"] == sum(moment.nbytes for moment in moments)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"data": None}, "data.mixture"),
        ({"model.vocab": 256}, "has 300 tokens"),
        ({"train.sequence_length": 10_000}, "tokens"),
        ({"data.tokenizer": "nowhere.model"}, "nowhere.model"),
    ],
)
def test_it_refuses_what_training_would(
    make_config: MakeConfig, tmp_path: Path, changes: dict, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        dry_run(make_config(changes))
    assert not (tmp_path / "runs").exists()


def test_of_a_pipeline_it_shows_the_grid_and_the_chunks(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the memory of the rank that holds the most: the first, with two layers and the vocabulary
    of the embedding, as large as the head's, and two micro-batches under way."""
    keys = {"pipeline": 2, "tensor": 2, "schedule": "1f1b", "stage_layers": [2, 1]}
    config = make_config({"model.layers": 3, **{f"parallel.{k}": v for k, v in keys.items()}})
    assert dry_run(config, processes=4) == 0
    out = capsys.readouterr().out
    grid = Grid(tensor=2, pipeline=2)
    assert f"{grid}\n" in out
    assert "chunk 0, on pp 0: layers 0 to 1, embedding\n" in out
    assert "chunk 1, on pp 1: layer 2, head\n" in out
    for name, size in held_bytes(config, grid).items():
        assert f"{name}: {size / 2**20:,.1f} MiB\n" in out
    assert "on the rank that holds the most" in out


def test_alone_there_is_no_grid_to_show(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run(make_config())
    out = capsys.readouterr().out
    assert "chunk" not in out
    assert "rank" not in out
