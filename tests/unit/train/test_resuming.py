"""A run that goes on with changed keys, or begins from the weights of another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megallama.checkpoint.store import Checkpoint, committed_checkpoints
from megallama.cli.main import main
from megallama.config.schema import Config
from megallama.data.build import build
from megallama.data.tokenizer import train_tokenizer
from megallama.errors import ConfigError
from megallama.train.job import train
from megallama.train.metrics import read_metrics
from tests.conftest import LENGTH, ConfigFile, MakeConfig, TinyData

Captured = pytest.CaptureFixture[str]


def newest(config: Config) -> Checkpoint:
    return Checkpoint(committed_checkpoints(config.run.directory / "checkpoints")[-1])


def steps(config: Config) -> list[int]:
    rows = read_metrics(config.run.directory / "metrics.jsonl")
    return [row["step"] for row in rows if "loss" in row]


def test_a_change_that_needs_permission_is_refused_until_it_has_it(
    make_config: MakeConfig, capsys: Captured
) -> None:
    assert train(make_config()) == 0
    changed = make_config({"train.steps": 8, "optimizer.weight_decay": 0.0, "log.every": 2})
    before = newest(changed).directory
    with pytest.raises(ConfigError, match=r"--allow optimizer\.weight_decay$"):
        train(changed)
    assert newest(changed).directory == before
    capsys.readouterr()
    assert train(changed, allowed=["optimizer.weight_decay"]) == 0
    told = "train.steps 6 → 8, optimizer.weight_decay 0.1 → 0.0, log.every 1 → 2"
    assert f"changed since: {told}\n" in capsys.readouterr().out
    assert steps(changed) == list(range(1, 9))
    assert train(changed) == 0, "it is what the newest checkpoint was trained with"


def test_on_the_command_line(config_file: ConfigFile, capsys: Captured) -> None:
    path = str(config_file())
    assert main(["train", path]) == 0
    assert main(["train", path, "train.steps=7", "optimizer.eps=1e-6"]) == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert "optimizer.eps: " in line
    assert line.endswith("change it with --allow optimizer.eps")
    words = ["train.steps=7", "optimizer.eps=1e-6", "--allow", "optimizer.eps"]
    assert main(["train", path, *words]) == 0
    assert main(["train", path, "--allow", "model.d_model"]) == 78
    assert "may never change" in capsys.readouterr().err


def test_a_new_phase_may_bring_a_new_source(
    make_config: MakeConfig, tiny_mapping: dict[str, Any]
) -> None:
    """The order of samples goes on from where it was."""
    code, prose = tiny_mapping["data"]["mixture"]
    first = make_config({"data.mixture": [code], "train.steps": 4})
    assert train(first) == 0
    phases = [
        {"until_tokens": 5 * 4 * LENGTH, "mixture": [code]},
        {"until_tokens": None, "mixture": [prose]},
    ]
    data = {"data.mixture": [], "data.phases": phases, "log.per_source": True}
    both = make_config({**data, "train.steps": 7})
    assert train(both) == 0
    rows = read_metrics(both.run.directory / "metrics.jsonl")
    sources = [(row["step"], *row["loss_per_source"]) for row in rows if "loss_per_source" in row]
    assert sources == [(5, "code"), (6, "prose"), (7, "prose")]
    with pytest.raises(ConfigError, match=r"data\.mixture: .*new mixture is a new phase"):
        train(make_config({"data.mixture": [prose], "train.steps": 9}))


@pytest.mark.parametrize("key, value", [("train.precision", "fp64"), ("data.mask_documents", True)])
def test_what_changes_the_numbers_and_not_the_state_may_be_allowed(
    make_config: MakeConfig, key: str, value: object
) -> None:
    assert train(make_config({"train.steps": 3})) == 0
    changed = make_config({key: value})
    with pytest.raises(ConfigError, match=f"^{key}: .*--allow {key}$"):
        train(changed)
    assert train(changed, allowed=[key]) == 0
    assert steps(changed) == [1, 2, 3, 4, 5, 6]


def test_a_run_begins_from_weights_alone(make_config: MakeConfig, capsys: Captured) -> None:
    """Step 0, no moments, data from its start: as if these weights were what the seed draws."""
    old = make_config()
    assert train(old) == 0
    source = newest(old)
    changes = {"run.name": "new", "run.seed": 7, "optimizer.lr": 0.02, "train.sequence_length": 16}
    config = make_config({**changes, "run.init_from": str(source.directory), "train.steps": 1})
    capsys.readouterr()
    assert train(config) == 0
    assert f"weights from {source.directory}\n" in capsys.readouterr().out
    assert steps(config) == [1]
    saved = newest(config)
    assert saved.manifest.state["samples"] == 4
    assert saved.manifest.state["updates"] == 1
    # AdamW's first update, in closed form: the moments say which gradients, the masters from where.
    betas, lr, eps, decay = (0.9, 0.95), 0.01, 1e-8, 0.1  # of warm-up, half of 0.02
    name = "layers.0.attention.wq.weight"
    exp_avg, exp_avg_sq = saved.read(f"exp_avg/{name}"), saved.read(f"exp_avg_sq/{name}")
    gradient = exp_avg / (1 - betas[0])
    torch.testing.assert_close(exp_avg_sq, (1 - betas[1]) * gradient.square())
    before = source.read(f"master/{name}")
    after = before * (1 - lr * decay) - lr * gradient / (gradient.abs() + eps)
    torch.testing.assert_close(saved.read(f"master/{name}"), after)


def test_where_a_run_began_is_recorded_and_not_asked_for_again(make_config: MakeConfig) -> None:
    old = make_config()
    assert train(old) == 0
    where = str(old.run.directory)
    assert train(make_config({"run.name": "new", "run.init_from": where, "train.steps": 2})) == 0
    longer = make_config({"run.name": "new", "train.steps": 4})
    assert train(longer) == 0
    recorded = yaml.safe_load((longer.run.directory / "config.yaml").read_text())
    assert recorded["run"]["init_from"] == where
    assert newest(longer).manifest.config["run"]["init_from"] == where
    again = {"run.name": "new", "run.init_from": where, "train.steps": 5}
    assert train(make_config(again)) == 0, "a requeued job gives the same command"
    assert steps(longer) == [1, 2, 3, 4, 5]
    for name, origin in (("new", str(newest(old).directory)), ("tiny", where)):
        with pytest.raises(ConfigError, match=r"run\.init_from=.* began .*run\.name"):
            train(make_config({"run.name": name, "run.init_from": origin}))


def test_weights_of_another_shape_or_tokenizer_are_refused(
    make_config: MakeConfig, tiny_data: TinyData, tmp_path: Path, capsys: Captured
) -> None:
    old = make_config()
    assert train(old) == 0
    new = {"run.name": "new", "run.init_from": str(old.run.directory)}
    with pytest.raises(ConfigError, match=r"^model\.ffn: the weights of .* with 24, .* says 28"):
        train(make_config({**new, "model.ffn": 28}))
    with pytest.raises(ConfigError, match="neither a checkpoint nor a run"):
        train(make_config({**new, "run.init_from": str(tmp_path)}))
    folder = tmp_path / "data"
    folder.mkdir()
    corpus = tiny_data.tokenizer.parent / "prose.jsonl"
    train_tokenizer([corpus], 290, folder / "tokenizer.model")
    build([corpus], folder / "tokenizer.model", folder / "prose", "text", 1)
    other = {
        "data.tokenizer": str(folder / "tokenizer.model"),
        "data.mixture": [{"name": "prose", "path": str(folder / "prose"), "weight": 1}],
    }
    with pytest.raises(ConfigError, match="trained with tokenizer"):
        train(make_config({**new, **other}))
    capsys.readouterr()
    assert train(make_config({**new, "model.rope_theta": 5000.0, "train.steps": 1})) == 0
    told = "the model differs from theirs: model.rope_theta 10000.0 → 5000.0\n"
    assert told in capsys.readouterr().out


def test_init_from_on_the_command_line(config_file: ConfigFile, tmp_path: Path) -> None:
    path = str(config_file({"train.steps": 2}))
    assert main(["train", path]) == 0
    begun = str(tmp_path / "runs" / "tiny")
    assert main(["train", path, "run.name=new", "--init-from", begun]) == 0
    (saved,) = committed_checkpoints(tmp_path / "runs" / "new" / "checkpoints")
    assert Checkpoint(saved).manifest.config["run"]["init_from"] == begun
