"""Which checkpoint a run goes on from, which it refuses, and what saving leaves behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megallama.checkpoint.store import Checkpoint, committed_checkpoints
from megallama.config.schema import Config
from megallama.data.build import build
from megallama.data.tokenizer import Tokenizer, train_tokenizer
from megallama.errors import ConfigError, CorruptError
from megallama.train.build import build_dataset, build_lone_model, build_trainer
from megallama.train.job import train
from megallama.train.meeting import Meeting
from megallama.train.metrics import read_metrics
from megallama.train.process import ALONE
from megallama.train.snapshot import Progress, find_checkpoint, restore, restore_weights, save
from tests.conftest import MakeConfig, TinyData
from tests.harness import flat, parts

TENSORS = "rank-00000.safetensors"


def checkpoint(config: Config, step: int) -> Path:
    return config.run.directory / "checkpoints" / f"step-{step:08d}"


def steps_saved(config: Config) -> list[int]:
    folder = config.run.directory / "checkpoints"
    return [int(path.name.removeprefix("step-")) for path in committed_checkpoints(folder)]


def damage(directory: Path) -> None:
    path = directory / TENSORS
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def test_a_trainer_comes_back_whole(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config()
    trainer, dataset = build_trainer(config), build_dataset(config)
    for step in range(3):
        trainer.step.run(dataset.batch(4 * step, 4), 0.01)
    progress = Progress(step=3, samples=12, tokens=384, updates=3, skipped=1, failures=1)
    directory = save(trainer, progress, tmp_path, dataset, Meeting(ALONE))

    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["state"] == vars(progress)
    assert manifest["config"] == config.model_dump(mode="json")
    assert manifest["tokenizer_hash"] == dataset.tokenizer_hash
    assert manifest["sources"] == dataset.fingerprints
    assert manifest["sources"].keys() == {"code", "prose"}
    names = {name.partition("/")[2] for name in manifest["tensors"]}
    kinds = {name.partition("/")[0] for name in manifest["tensors"]}
    assert kinds == {"master", "exp_avg", "exp_avg_sq"}
    assert len(manifest["tensors"]) == 3 * len(names)
    assert {"tok_embeddings.weight", "layers.1.attention.wk.weight", "norm.weight"} <= names

    other = build_trainer(config)
    assert restore(other, Checkpoint(directory), dataset) == progress
    assert other.optimizer.updates == 3
    assert flat(other.model.state.masters).equal(flat(trainer.model.state.masters))
    for mine, theirs in (
        (other.optimizer.exp_avg, trainer.optimizer.exp_avg),
        (other.optimizer.exp_avg_sq, trainer.optimizer.exp_avg_sq),
    ):
        assert all(mine[name].equal(theirs[name]) for name in theirs)
        assert any(theirs[name].any() for name in theirs)


def test_weights_alone_come_back_in_the_compute_dtype(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config({"train.precision": "bf16"})
    trainer = build_trainer(config)
    for master in trainer.model.state.masters.values():
        master.add_(0.1)
    directory = save(trainer, Progress(), tmp_path, build_dataset(config), Meeting(ALONE))
    model, zero = build_lone_model(config, trainer.device)
    restore_weights(model, zero, Checkpoint(directory))
    masters = parts(trainer.model.state, trainer.model.state.masters)
    weights = parts(model.state, model.state.weights)
    assert flat(weights).dtype == torch.bfloat16
    assert flat(weights).equal(flat(masters).bfloat16())


def test_a_damaged_newest_is_passed_over_and_overwritten_in_its_time(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config({"checkpoint.every": 2, "checkpoint.keep": 2})
    assert train(config) == 0
    assert steps_saved(config) == [4, 6]
    whole = (checkpoint(config, 6) / TENSORS).read_bytes()
    damage(checkpoint(config, 6))
    capsys.readouterr()

    assert train(config) == 0
    out = capsys.readouterr().out
    assert "passed over a damaged checkpoint" in out
    assert f"{checkpoint(config, 6) / TENSORS}: tensor " in out
    assert f"resumed from {checkpoint(config, 4)}" in out
    assert (checkpoint(config, 6) / TENSORS).read_bytes() == whole
    Checkpoint(checkpoint(config, 6)).verify()
    assert [r["step"] for r in read_metrics(config.run.directory / "metrics.jsonl")] == [
        *(1, 2, 2, 3, 4, 4, 5, 6, 6)
    ]


def test_a_damaged_newer_checkpoint_does_not_push_out_the_one_just_saved(
    make_config: MakeConfig, signal_at: Callable[..., None]
) -> None:
    config = make_config({"checkpoint.every": 3, "checkpoint.keep": 2})
    assert train(config) == 0
    damage(checkpoint(config, 6))
    one = config.model_copy(
        update={"checkpoint": config.checkpoint.model_copy(update={"keep": 1, "every": 0})}
    )
    signal_at(5)
    assert train(one) == 75
    assert steps_saved(config) == [5, 6]
    Checkpoint(checkpoint(config, 5)).verify()
    signal_at(0)
    assert train(one) == 0
    assert steps_saved(config) == [6]
    Checkpoint(checkpoint(config, 6)).verify()


def test_a_copy_under_the_name_of_a_later_step_is_passed_over(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else each start would go back to it, whatever was saved since."""
    config = make_config()
    assert train(config) == 0
    shutil.copytree(checkpoint(config, 3), checkpoint(config, 9))
    capsys.readouterr()
    assert train(config) == 0
    out = capsys.readouterr().out
    assert f"{checkpoint(config, 9)}: has the state of step 3; rename it to step-00000003" in out
    assert f"resumed from {checkpoint(config, 6)}" in out
    assert train(make_config({"run.name": "b"}), str(checkpoint(config, 3))) == 0
    best = checkpoint(config, 9).rename(config.run.directory / "best")
    assert train(make_config({"run.name": "c"}), str(best)) == 0, "other names are free"


def test_nothing_is_overwritten_where_all_are_damaged(make_config: MakeConfig) -> None:
    config = make_config()
    assert train(config) == 0
    for step in (3, 6):
        damage(checkpoint(config, step))
    before = {p: p.read_bytes() for p in config.run.directory.rglob("*") if p.is_file()}
    with pytest.raises(CorruptError, match="none of its 2 checkpoints is intact"):
        train(config)
    after = {p: p.read_bytes() for p in config.run.directory.rglob("*") if p.is_file()}
    assert after == before


def test_an_interrupted_save_is_ignored_and_written_anew(make_config: MakeConfig) -> None:
    config = make_config()
    assert train(config) == 0
    whole = (checkpoint(config, 6) / TENSORS).read_bytes()
    (checkpoint(config, 6) / "manifest.json").unlink()
    (checkpoint(config, 6) / TENSORS).write_bytes(whole[:100])
    assert find_checkpoint(config.run.directory).directory == checkpoint(config, 3)
    assert train(config) == 0
    assert (checkpoint(config, 6) / TENSORS).read_bytes() == whole
    assert steps_saved(config) == [3, 6]


def test_the_oldest_goes_only_once_the_new_one_is_there(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config({"checkpoint.every": 2, "checkpoint.keep": 1})
    real, seen = os.replace, []

    def watched(source: Path, target: Path) -> None:
        if Path(target).name == "manifest.json":
            seen.append(steps_saved(config))
        real(source, target)

    monkeypatch.setattr(os, "replace", watched)
    assert train(config) == 0
    assert seen == [[], [2], [4]]
    assert steps_saved(config) == [6]


def test_a_full_disk_ends_a_run_in_one_line_with_its_last_checkpoint_whole(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    real = os.fsync

    def full(descriptor: int) -> None:
        if checkpoint(config, 6).exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"step-00000006.*No space left") as caught:
        train(config)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert steps_saved(config) == [3]
    Checkpoint(checkpoint(config, 3)).verify()
    assert train(config) == 0
    assert steps_saved(config) == [3, 6]


OTHER_RUNS = {
    "model.ffn": 28,
    "model.rope_theta": 5000.0,
    "model.norm_eps": 1e-6,
    "model.tie_embeddings": False,
    "run.seed": 7,
    "train.sequence_length": 16,
    "data.tokenizer": None,
    "validation.sequences": 6,
    "validation.every": 0,
}


@pytest.mark.parametrize("key", [*OTHER_RUNS, "data.mixture"])
def test_a_checkpoint_of_another_run_is_refused_by_the_key(
    make_config: MakeConfig, tiny_mapping: dict, key: str
) -> None:
    """What decides the model, the numbers or the order of samples may not change on the way."""
    config = make_config()
    directory = save(
        build_trainer(config),
        Progress(),
        config.run.directory / "checkpoints",
        build_dataset(config),
        Meeting(ALONE),
    )
    value = OTHER_RUNS.get(key, tiny_mapping["data"]["mixture"][:1])
    other = build_trainer(make_config({key: value}))
    before = flat(other.model.state.masters)
    with pytest.raises(ConfigError, match=rf"^{key}.*trained with") as caught:
        restore(other, Checkpoint(directory), build_dataset(other.config))
    assert str(directory) in str(caught.value)
    assert flat(other.model.state.masters).equal(before)


@pytest.mark.parametrize(
    "changes",
    [
        {"train.steps": 9},
        {"train.micro_batch": 4, "train.global_batch": 8},
        {"train.saved_activations": "layer_input", "optimizer.lr": 0.5, "log.per_source": True},
        {"validation.every": 5, "checkpoint.every": 1},
    ],
)
def test_length_batch_rate_and_logging_may_change(make_config: MakeConfig, changes: dict) -> None:
    config = make_config()
    folder = config.run.directory / "checkpoints"
    directory = save(
        build_trainer(config), Progress(step=1), folder, build_dataset(config), Meeting(ALONE)
    )
    other = build_trainer(make_config(changes))
    assert restore(other, Checkpoint(directory), build_dataset(other.config)).step == 1


def test_without_validation_nothing_is_held_out_and_the_number_does_not_matter(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config({"validation.every": 0, "validation.sequences": 5})
    directory = save(
        build_trainer(config), Progress(step=1), tmp_path, build_dataset(config), Meeting(ALONE)
    )
    other = build_trainer(make_config({"validation.every": 0, "validation.sequences": 6}))
    assert restore(other, Checkpoint(directory), build_dataset(other.config)).step == 1


def test_a_run_does_not_go_on_with_another_tokenizer(
    make_config: MakeConfig, tiny_data: TinyData, tmp_path: Path
) -> None:
    """The config names the same path, and data and tokenizer there agree: only the hash tells."""
    folder = tmp_path / "data"
    shutil.copytree(tiny_data.tokenizer.parent, folder)
    source = [{"name": "code", "path": str(folder / "code"), "weight": 1}]
    config = make_config(
        {"data.tokenizer": str(folder / "tokenizer.model"), "data.mixture": source}
    )
    assert train(config) == 0
    old = Tokenizer(folder / "tokenizer.model").hash
    train_tokenizer([folder / "prose.jsonl"], 290, folder / "tokenizer.model")
    build([folder / "code.jsonl"], folder / "tokenizer.model", folder / "code", "text", 1)
    with pytest.raises(ConfigError, match=r"tokenizer\.model") as caught:
        train(config)
    assert old in str(caught.value)


def test_a_run_may_begin_from_anothers_checkpoint(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make_config()
    assert train(first) == 0
    for name, resume in (("b", first.run.directory), ("c", checkpoint(first, 3))):
        config = make_config({"run.name": name, "train.steps": 8})
        assert train(config, str(resume)) == 0
        assert f"resumed from {first.run.directory}" in capsys.readouterr().out
        assert 8 in steps_saved(config)
    steps = [r["step"] for r in read_metrics(config.run.directory / "metrics.jsonl") if "loss" in r]
    assert steps == [4, 5, 6, 7, 8]
    assert steps_saved(first) == [3, 6]


def test_a_finished_run_begun_elsewhere_is_saved_here(make_config: MakeConfig) -> None:
    first, other = make_config(), make_config({"run.name": "copy"})
    assert train(first) == 0
    assert train(other, str(first.run.directory)) == 0
    assert steps_saved(other) == [6]
    mine, theirs = (load_file(checkpoint(c, 6) / TENSORS) for c in (first, other))
    assert all(mine[name].equal(theirs[name]) for name in mine)


def test_a_path_older_than_the_runs_own_checkpoints_is_refused(make_config: MakeConfig) -> None:
    """Else its newer checkpoints, of what is then another course, would be resumed from next."""
    config = make_config()
    assert train(config) == 0
    before = {p: p.read_bytes() for p in config.run.directory.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=r"step-00000003.*step-00000006.*--resume auto"):
        train(config, str(checkpoint(config, 3)))
    assert {p: p.read_bytes() for p in config.run.directory.rglob("*") if p.is_file()} == before
    shutil.rmtree(checkpoint(config, 6))
    assert train(config, str(checkpoint(config, 3))) == 0
    assert steps_saved(config) == [3, 6]


def test_a_path_elsewhere_is_refused_where_the_run_has_checkpoints(
    make_config: MakeConfig,
) -> None:
    """A requeued job that names the path again must not throw away what it has done since."""
    first, second = make_config({"run.name": "first"}), make_config({"train.steps": 8})
    assert train(first) == 0
    assert train(second, str(first.run.directory)) == 0
    with pytest.raises(ConfigError, match=r"has a checkpoint of its own, step-00000008"):
        train(second, str(first.run.directory))
    assert train(second, str(second.run.directory)) == 0
    assert train(second) == 0


def test_token_files_built_anew_are_refused_and_moved_ones_are_not(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """Another count of tokens is another order of samples, whatever the files are called."""
    config = make_config()
    assert train(config) == 0
    source = config.data.mixture[0]
    moved = tmp_path / "elsewhere" / "corpus"
    moved.parent.mkdir()
    for suffix in (".bin", ".idx", ".json"):
        shutil.copy(f"{source.path}{suffix}", f"{moved}{suffix}")
    mixture = [s.model_dump(mode="json") for s in config.data.mixture]
    mixture[0]["path"] = str(moved)
    longer = {"data.mixture": mixture, "train.steps": 7}
    assert train(make_config(longer)) == 0

    text = tmp_path / "other.txt"
    text.write_text("the quick brown fox\n" * 2000)
    build([text], config.data.tokenizer, moved)
    before = {p: p.read_bytes() for p in config.run.directory.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=rf"data source '{source.name}'.*have changed"):
        train(make_config({**longer, "train.steps": 8}))
    assert before == {p: p.read_bytes() for p in config.run.directory.rglob("*") if p.is_file()}
