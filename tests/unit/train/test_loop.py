"""The loop: a run interrupted anywhere is the run that was not, and what it logs is right."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from megallama.checkpoint.store import Checkpoint, committed_checkpoints
from megallama.config.load import load_config
from megallama.config.schema import Config
from megallama.data.dataset import Batch, Dataset
from megallama.errors import ConfigError, CorruptError, DivergedError
from megallama.optim.schedule import learning_rate
from megallama.train import loop
from megallama.train.build import build_dataset, build_trainer
from megallama.train.job import train
from megallama.train.metrics import MetricsWriter, Row, read_metrics
from megallama.train.step import TrainStep
from megallama.train.tally import Tally
from megallama.train.trackers import Tracker
from tests.conftest import MakeConfig, losses
from tests.harness import flat

VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {"log.per_source": True, "log.layer_norms_every": 2},
    "bf16, documents masked, four micro-batches": {
        "train.precision": "bf16",
        "train.micro_batch": 1,
        "data.mask_documents": True,
        "model.tie_embeddings": False,
    },
}


def result_of(config: Config) -> tuple[list[Any], bytes]:
    """The rows without their timings, and the last checkpoint's tensor file byte for byte."""
    last = committed_checkpoints(config.run.directory / "checkpoints")[-1]
    return losses(config.run.directory), (last / "rank-00000.safetensors").read_bytes()


def step_rows(config: Config) -> list[Row]:
    return [r for r in read_metrics(config.run.directory / "metrics.jsonl") if "loss" in r]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_stopped_at_any_step_goes_on_bit_for_bit(
    make_config: MakeConfig, signal_at: Callable[..., None], variant: str
) -> None:
    """Over validations (steps 2, 4, 6) and checkpoints (3, 6), before, at and after them."""
    changes = VARIANTS[variant]
    straight = make_config({**changes, "run.name": "straight"})
    assert train(straight) == 0
    expected = result_of(straight)
    assert [row["step"] for row in step_rows(straight)] == [1, 2, 3, 4, 5, 6]
    assert len({row["loss"] for row in step_rows(straight)}) == 6
    for step in range(1, 6):
        config = make_config({**changes, "run.name": f"stopped-{step}"})
        signal_at(step, signal.SIGUSR1)
        assert train(config) == 75
        assert [row["step"] for row in step_rows(config)] == list(range(1, step + 1))
        saved = committed_checkpoints(config.run.directory / "checkpoints")[-1]
        assert saved.name == f"step-{step:08d}"
        signal_at(0)
        assert train(config) == 0
        assert result_of(config) == expected, f"stopped after step {step}"


def test_a_run_stopped_at_every_step_by_the_time_box_goes_on_bit_for_bit(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = make_config({"run.name": "straight"})
    assert train(straight) == 0
    config = make_config({"train.max_minutes": 1e-9})
    codes = [train(config) for _ in range(6)]
    assert codes == [75] * 5 + [0]
    assert "time box of 1e-09 minutes: saving and stopping" in capsys.readouterr().out
    assert result_of(config) == result_of(straight)


def test_steps_after_the_last_checkpoint_are_done_again_with_one_row_each(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill leaves rows beyond the last checkpoint, and a torn one."""
    straight = make_config({"run.name": "straight"})
    assert train(straight) == 0
    config = make_config()
    real = TrainStep.run

    def killed(step: TrainStep, *arguments: Any) -> Any:
        if len(step_rows(config)) == 5:
            raise ZeroDivisionError  # nothing is saved on the way out
        return real(step, *arguments)

    monkeypatch.setattr(TrainStep, "run", killed)
    with pytest.raises(ZeroDivisionError):
        train(config)
    monkeypatch.undo()
    with open(config.run.directory / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    folder = config.run.directory / "checkpoints"
    assert [path.name for path in committed_checkpoints(folder)] == ["step-00000003"]
    assert train(config) == 0
    assert result_of(config) == result_of(straight)


def test_a_longer_run_goes_on_from_a_finished_one(make_config: MakeConfig) -> None:
    flat = {"optimizer.schedule": "constant", "validation.every": 4}
    straight = make_config({**flat, "run.name": "straight", "train.steps": 8})
    assert train(straight) == 0
    assert train(make_config({**flat, "train.steps": 4})) == 0
    longer = make_config({**flat, "train.steps": 8})
    assert train(longer) == 0
    assert result_of(longer) == result_of(straight)


def test_rows_hold_what_they_say(make_config: MakeConfig) -> None:
    config = make_config({"log.per_source": True})
    assert train(config) == 0
    rows = step_rows(config)
    order = build_dataset(config).order
    for step, row in enumerate(rows, 1):
        assert row["step"] == step
        assert row["tokens"] == step * 4 * 32
        assert row["lr"] == pytest.approx(learning_rate(config.optimizer, step, 6))
        assert row["mfu"] is None
        assert row["mfu_6n"] is None
        assert row["tokens_per_second"] == pytest.approx(4 * 32 / row["step_seconds"])
        assert row["epochs"] == order.epochs(4 * step)
        assert "skipped_steps" not in row
        assert "layer_norms" not in row
        # Every sample has as many tokens, so the batch's mean is that of its samples' means.
        sources = order.locate(range(4 * step - 4, 4 * step)).source.tolist()
        names = [order.source_names[source] for source in sources]
        assert row["loss_per_source"].keys() == set(names)
        mean = sum(row["loss_per_source"][name] for name in names) / 4
        assert mean == pytest.approx(row["loss"])


def test_validations_come_when_asked_and_at_the_end(make_config: MakeConfig) -> None:
    config = make_config({"validation.every": 4, "train.steps": 6})
    assert train(config) == 0
    rows = read_metrics(config.run.directory / "metrics.jsonl")
    found = [row for row in rows if "validation_loss" in row]
    assert [row["step"] for row in found] == [4, 6]
    assert [row["tokens"] for row in found] == [4 * 128, 6 * 128]
    for row in found:
        per_source = row["validation_loss_per_source"]
        assert per_source.keys() == {"code", "prose"}
        assert row["validation_loss"] == pytest.approx(sum(per_source.values()) / 2)


def test_layer_norms_come_when_asked(make_config: MakeConfig) -> None:
    config = make_config({"log.layer_norms_every": 3})
    assert train(config) == 0
    with_norms = {row["step"]: row["layer_norms"] for row in step_rows(config) if len(row) > 12}
    assert sorted(with_norms) == [3, 6]
    for norms in with_norms.values():
        assert len(norms["gradient"]) == len(norms["activation"]) == 2
        assert min(*norms["gradient"], *norms["activation"]) > 0


def plant(monkeypatch: pytest.MonkeyPatch, bad: set[int], value: float) -> None:
    """The embedding's gradient holds `value` in some calls of the step, counted from 1."""
    real, calls = TrainStep.run, 0

    def run(step: TrainStep, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        state = step.model.state
        fold = state.fold_tied_gradient

        def folded() -> None:
            fold()
            if calls in bad:
                state.gradients["tok_embeddings"][3, 5] = value

        monkeypatch.setattr(state, "fold_tied_gradient", folded)
        result = real(step, *arguments)
        monkeypatch.setattr(state, "fold_tied_gradient", fold)
        return result

    monkeypatch.setattr(TrainStep, "run", run)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_step_that_is_not_finite_is_left_out_and_counted(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    value: float,
) -> None:
    config = make_config({"checkpoint.every": 1, "checkpoint.keep": 9})
    plant(monkeypatch, {3, 5}, value)
    assert train(config) == 0
    out = capsys.readouterr().out
    assert "step 3 left out: the gradient of tok_embeddings is not finite" in out
    rows = step_rows(config)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row.get("skipped_steps") for row in rows] == [None, None, 1, 1, 2, 2]
    assert [row["grad_norm"] is None for row in rows] == [False, False, True, False, True, False]
    folder = config.run.directory / "checkpoints"
    states = [Checkpoint(path) for path in committed_checkpoints(folder)]
    assert [c.manifest.state["step"] for c in states] == [1, 2, 4, 6], "no step left out is saved"
    assert [c.manifest.state["updates"] for c in states] == [1, 2, 3, 4]
    assert [c.manifest.state["skipped"] for c in states] == [0, 0, 1, 2]
    weights = [c.read("master/tok_embeddings.weight") for c in states]
    assert not weights[1].equal(weights[2])
    assert all(w.isfinite().all() for w in weights)


def test_ten_in_a_row_give_the_run_up_and_save_nothing_bad(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config({"train.steps": 20, "checkpoint.every": 4})
    plant(monkeypatch, set(range(6, 100)), float("inf"))
    with pytest.raises(DivergedError, match="step 15: 10 steps in a row were not finite") as caught:
        train(config)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    folder = config.run.directory / "checkpoints"
    paths = committed_checkpoints(folder)
    assert [path.name for path in paths] == ["step-00000004"]
    for path in paths:
        checkpoint = Checkpoint(path)
        for name in checkpoint.manifest.tensors:
            assert checkpoint.read(name).isfinite().all()
    monkeypatch.undo()
    assert train(config) == 0
    assert "skipped_steps" not in step_rows(config)[-1], "the steps left out were taken again"


def test_nine_in_a_row_do_not(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config({"train.steps": 12})
    plant(monkeypatch, set(range(2, 11)), float("inf"))
    assert train(config) == 0
    assert step_rows(config)[-1]["skipped_steps"] == 9


def test_a_step_whose_loss_is_not_finite_changes_no_weight(make_config: MakeConfig) -> None:
    config = make_config({"model.tie_embeddings": False})
    trainer, dataset = build_trainer(config), build_dataset(config)
    trainer.model.state.masters["norm"][0] = float("inf")
    before = flat(trainer.model.state.masters)
    result = trainer.step.run(dataset.batch(0, 4), 0.01)
    assert not result.applied
    assert result.fault is not None
    assert result.fault.startswith("loss is ")
    assert flat(trainer.model.state.masters).equal(before)
    assert trainer.optimizer.updates == 0


def test_a_full_disk_for_metrics_does_not_end_the_run(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, real = make_config(), MetricsWriter.write

    def full(writer: MetricsWriter, row: Row) -> None:
        if step_rows(config):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(writer, row)

    monkeypatch.setattr(MetricsWriter, "write", full)
    assert train(config) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("No space left on device; its rows wait in memory") == 1
    assert "8 rows are lost, the first of step 2" in out
    assert [row["step"] for row in step_rows(config)] == [1]


def test_rows_that_waited_for_the_disk_are_written(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, config = make_config({"run.name": "straight"}), make_config()
    assert train(straight) == 0
    real = MetricsWriter.write

    def full(writer: MetricsWriter, row: Row) -> None:
        if row["step"] == 2 and not committed_checkpoints(config.run.directory / "checkpoints"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(writer, row)

    monkeypatch.setattr(MetricsWriter, "write", full)
    assert train(config) == 0
    assert losses(config.run.directory) == losses(straight.run.directory)


def test_metrics_that_cannot_be_opened_are_one_line(make_config: MakeConfig) -> None:
    config = make_config()
    (config.run.directory / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: Is a directory"):
        train(config)


def test_a_phase_that_ends_before_the_run_is_refused_before_the_first_step(
    make_config: MakeConfig, tiny_mapping: dict[str, Any]
) -> None:
    phase = {"until_tokens": 5 * 4 * 32, "mixture": tiny_mapping["data"]["mixture"]}
    config = make_config({"data.mixture": [], "data.phases": [phase]})
    with pytest.raises(ConfigError, match="until_tokens"):
        train(config)
    assert not config.run.directory.exists()
    phase["until_tokens"] = 6 * 4 * 32
    assert train(make_config({"data.mixture": [], "data.phases": [phase]})) == 0


def test_wandb_offline_writes_its_files(make_config: MakeConfig) -> None:
    config = make_config({"log.wandb": "offline", "validation.every": 0, "train.steps": 3})
    assert train(config) == 0
    (file,) = (config.run.directory / "wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"lm loss" in content
    assert b"grad-norm" in content


class _Hanging(Tracker):
    """A tracker whose backend never starts; its close gives up soon, for the test's sake."""

    def close(self, timeout: float = 0.1) -> bool:
        return super().close(timeout)


def test_a_hanging_tracker_does_not_stop_training(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    never = threading.Event()

    def hanging(*arguments: Any, warn: Callable[[str], None], **named: Any) -> Tracker:
        return _Hanging(lambda: never.wait() and None, queue_size=2, warn=warn)  # type: ignore

    config = make_config()
    monkeypatch.setattr(loop, "wandb_tracker", hanging)
    assert train(config) == 0
    never.set()
    assert [row["step"] for row in step_rows(config)] == [1, 2, 3, 4, 5, 6]
    assert capsys.readouterr().out.count("warning: the tracker") == 1


def test_what_is_printed_is_what_is_logged(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config({"log.every": 3})
    assert train(config) == 0
    out = capsys.readouterr().out.splitlines()
    shown = [line.split() for line in out if line.split()[0].isdecimal()]
    assert [line[0] for line in shown] == ["1", "2", "3", "4", "6", "6"]
    logged = {(r["step"], "loss" in r): r for r in map(json.loads, _lines(config))}
    for line in shown:
        row = logged[int(line[0]), "validation" not in line]
        assert line[1] == format(row.get("loss", row.get("validation_loss")), ".4f")


def _lines(config: Config) -> list[str]:
    return (config.run.directory / "metrics.jsonl").read_text().splitlines()


def test_the_run_keeps_its_config(make_config: MakeConfig) -> None:
    config = make_config()
    assert train(config) == 0
    assert load_config(config.run.directory / "config.yaml") == config


def test_data_found_corrupt_in_mid_run_costs_no_step(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Dataset.batch

    def damaged_from_step_4(dataset: Dataset, first_sample: int, count: int) -> Batch:
        if first_sample >= 3 * count:
            raise CorruptError("corpus.bin: cut")
        return read(dataset, first_sample, count)

    config = make_config({"checkpoint.every": 0})
    monkeypatch.setattr(Dataset, "batch", damaged_from_step_4)
    with pytest.raises(CorruptError, match="cut"):
        train(config)
    saved = committed_checkpoints(config.run.directory / "checkpoints")
    assert [path.name for path in saved] == ["step-00000003"]


def test_a_stretch_that_is_not_finite_pushes_no_checkpoint_out(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights may be its reason. Ten in a row save nothing; the run's last is kept apart."""
    keep_one = {"checkpoint.every": 1, "checkpoint.keep": 1}
    config = make_config(keep_one)
    assert train(config) == 0
    folder = config.run.directory / "checkpoints"
    good = (folder / "step-00000006" / "rank-00000.safetensors").read_bytes()
    monkeypatch.setattr(Tally, "_fault", lambda *_: "loss is nan")
    for steps, reason, names in (
        (40, "step 16: 10 steps in a row were not finite", ["step-00000006"]),
        (8, "the last of the run", ["step-00000006", "step-00000008"]),
    ):
        with pytest.raises(DivergedError, match=reason):
            train(make_config({**keep_one, "train.steps": steps}))
        assert [path.name for path in committed_checkpoints(folder)] == names
    assert (folder / "step-00000006" / "rank-00000.safetensors").read_bytes() == good
    monkeypatch.undo()
    assert train(make_config({**keep_one, "train.steps": 9})) == 0
    assert [path.name for path in committed_checkpoints(folder)] == ["step-00000009"]


def test_a_stop_after_a_step_that_was_not_finite_loses_nothing(
    make_config: MakeConfig, signal_at: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 75 says that the work is saved, without a periodic checkpoint too."""

    def fails_at_step_3() -> None:
        fault, count = Tally._fault, []

        def failing(tally: Tally, *values: Any) -> str | None:
            count.append(1)
            return "loss is nan" if len(count) == 3 else fault(tally, *values)

        monkeypatch.setattr(Tally, "_fault", failing)

    once = {"checkpoint.every": 0}
    real = Tally._fault
    straight = make_config({**once, "run.name": "straight"})
    fails_at_step_3()
    assert train(straight) == 0
    config = make_config(once)
    monkeypatch.setattr(Tally, "_fault", real)
    fails_at_step_3()
    signal_at(3)
    assert train(config) == 75
    saved = committed_checkpoints(config.run.directory / "checkpoints")
    assert [path.name for path in saved] == ["step-00000003"]
    signal_at(0)
    assert train(config) == 0
    assert result_of(config) == result_of(straight)


def test_checkpoints_that_cannot_be_written_are_found_before_training(
    make_config: MakeConfig,
) -> None:
    config = make_config()
    config.run.directory.mkdir(parents=True)
    (config.run.directory / "checkpoints").write_text("a file")
    with pytest.raises(ConfigError, match="checkpoints"):
        train(config)
    assert not (config.run.directory / "metrics.jsonl").exists()
