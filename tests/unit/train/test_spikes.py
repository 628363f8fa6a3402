"""The loss-spike guard: poisoned samples send the run back, and it goes on without them, bit for
bit as if it had never been given them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megallama.checkpoint.store import Checkpoint, committed_checkpoints
from megallama.config.schema import Config
from megallama.data.dataset import Dataset
from megallama.errors import ConfigError, DivergedError
from megallama.optim.schedule import learning_rate
from megallama.train import spikes
from megallama.train.build import build_dataset, build_trainer
from megallama.train.job import train
from megallama.train.loop import Loop
from megallama.train.metrics import MetricsWriter, Row, read_metrics
from megallama.train.spikes import joined, kept_for, targets
from tests.conftest import MakeConfig, losses
from tests.poison import poison

BATCH, STEPS = 4, 12
#: The batch of step 10 is poisoned. The run goes back to step 6; then step 8 has the next one, and
#: of the checkpoints that are left that of step 5 is the oldest.
POISONED = {*range(36, 40), *range(44, 48)}
SKIPPED = [20, 48]
GUARDED: dict[str, Any] = {
    "train.steps": STEPS,
    "optimizer.schedule": "constant",
    "validation.every": 4,
    "checkpoint.every": 1,
    "checkpoint.keep": 5,
    "train.spike": {"factor": 1.03, "window": 3, "rewind": 4},
}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    real = Dataset.batch
    poison(POISONED)
    yield
    Dataset.batch = real  # type: ignore[method-assign]


@pytest.fixture
def guarded(make_config: MakeConfig) -> Callable[..., Config]:
    return lambda name, changes=None: make_config({**GUARDED, "run.name": name, **(changes or {})})


def newest(config: Config) -> Checkpoint:
    return Checkpoint(committed_checkpoints(config.run.directory / "checkpoints")[-1])


def result_of(config: Config) -> tuple[list[Any], bytes, dict[str, Any]]:
    last = newest(config)
    file = last.directory / "rank-00000.safetensors"
    return losses(config.run.directory), file.read_bytes(), last.manifest.state


@pytest.fixture(scope="module")
def known() -> list[Any]:
    """The result of the run that is not stopped or killed, once a test has made it."""
    return []


@pytest.fixture
def expected(known: list[Any], guarded: Callable[..., Config]) -> Any:
    if not known:
        straight = guarded("straight")
        assert train(straight) == 0
        known.append(result_of(straight))
    return known[0]


def rows_of(config: Config, kind: str = "loss") -> list[Row]:
    return [r for r in read_metrics(config.run.directory / "metrics.jsonl") if kind in r]


def test_it_is_the_run_that_never_had_the_samples(guarded: Callable[..., Config]) -> None:
    """Which is done here step by step, without a loop, a guard or a checkpoint."""
    config = guarded("guarded")
    assert train(config) == 0
    trainer, dataset = build_trainer(config), build_dataset(config)
    wanted = []
    for step in range(1, STEPS + 1):
        first = (step - 1) * BATCH + (SKIPPED[1] - SKIPPED[0] if step > 5 else 0)
        lr = learning_rate(config.optimizer, step, STEPS)
        wanted.append(trainer.step.run(dataset.batch(first, BATCH), lr))
    rows = rows_of(config)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows] == [result.loss for result in wanted]
    assert [row["grad_norm"] for row in rows] == [result.grad_norm for result in wanted]
    assert [row["tokens"] for row in rows] == [BATCH * 32 * step for step in range(1, STEPS + 1)]
    last = newest(config)
    for piece, tensor in trainer.model.state.pieces(trainer.model.state.masters):
        assert last.read(f"master/{piece.part.name}").equal(tensor)
    for piece, tensor in trainer.model.state.pieces(trainer.optimizer.exp_avg_sq):
        assert last.read(f"exp_avg_sq/{piece.part.name}").equal(tensor)
    state = last.manifest.state
    assert (state["skips"], state["rewinds"], state["samples"]) == (
        [SKIPPED],
        2,
        STEPS * BATCH + SKIPPED[1] - SKIPPED[0],
    )
    assert state["losses"] == [row["loss"] for row in rows[-3:]]


def test_what_was_undone_is_recorded(
    guarded: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = guarded("guarded")
    assert train(config) == 0
    (row,) = rows_of(config, "rewind")
    assert row["step"] == 6
    assert row["tokens"] == 5 * BATCH * 32
    found = row["rewind"]
    assert (found["from_step"], found["skipped_samples"]) == (8, SKIPPED)
    assert found["loss"] > 1.03 * found["median"]
    out = capsys.readouterr().out
    assert "step 10: the loss is " in out
    assert "step 8: the loss is " in out
    assert out.count("; going back") == 2


@pytest.mark.parametrize("step", [5, 8, 9])
def test_a_run_stopped_anywhere_goes_back_alike(
    guarded: Callable[..., Config], signal_at: Callable[..., None], expected: Any, step: int
) -> None:
    """Step 9 is stopped before the first spike and after, steps 5 and 8 in either course."""
    config = guarded("stopped")
    signal_at(step, signal.SIGUSR1)
    assert train(config) == 75
    assert train(config) in (0, 75)
    signal_at(0)
    assert train(config) == 0
    assert result_of(config) == expected


def killed_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """The `call`th time, from 1, that the run gets there while it goes back, it ends at once."""
    real, back, calls = getattr(owner, name), spikes.Spikes.go_back, 0
    going = False

    def go_back(*arguments: Any) -> Any:
        nonlocal going
        going = True
        return back(*arguments)

    def fatal(*arguments: Any) -> Any:
        nonlocal calls
        calls += going
        if going and calls == call:
            raise ZeroDivisionError
        return real(*arguments)

    monkeypatch.setattr(spikes.Spikes, "go_back", go_back)
    monkeypatch.setattr(owner, name, fatal)


@pytest.mark.parametrize(
    "owner, name, call",
    [
        (spikes, "begin", 1),
        (spikes.Spikes, "_abandon", 1),
        (spikes, "delete_checkpoint", 1),
        (spikes, "delete_checkpoint", 2),
        (spikes, "delete_checkpoint", 3),
        (spikes, "delete_checkpoint", 4),  # of the second spike
        (Loop, "_take_rows_back", 1),
        (MetricsWriter, "write", 1),
        (MetricsWriter, "write", 2),
        (spikes, "begin", 2),
    ],
)
def test_a_run_killed_while_it_goes_back_comes_to_the_same(
    guarded: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    expected: Any,
    owner: Any,
    name: str,
    call: int,
) -> None:
    config = guarded("killed")
    with monkeypatch.context() as patch:
        killed_at(patch, owner, name, call)
        with pytest.raises(ZeroDivisionError):
            train(config)
    assert train(config) == 0
    assert result_of(config) == expected


def test_stops_between_do_not_cost_the_checkpoint_it_goes_back_to(
    guarded: Callable[..., Config], signal_at: Callable[..., None]
) -> None:
    """Saved every 4 steps and kept twice; stopped at 5, 6, 7 and 9 that are not regular."""
    changes = {
        "checkpoint.every": 4,
        "checkpoint.keep": 2,
        "train.spike": {**GUARDED["train.spike"], "rewind": 5},
    }
    straight, config = guarded("straight", changes), guarded("stopped", changes)
    assert train(straight) == 0
    assert newest(straight).manifest.state["skips"] == [[16, 40]]
    for step in (5, 6, 7, 9):
        signal_at(step, signal.SIGUSR1)
        assert train(config) == 75
    signal_at(0)
    assert train(config) == 0
    assert result_of(config) == result_of(straight)


def test_without_a_checkpoint_far_enough_back_it_goes_on(
    guarded: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = guarded("early", {"checkpoint.every": 12, "checkpoint.keep": 2})
    assert train(config) == 0
    assert "there is no checkpoint to go back to yet, so it goes on" in capsys.readouterr().out
    assert rows_of(config, "rewind") == []
    assert newest(config).manifest.state["skips"] == []


def test_too_many_spikes_end_the_run(guarded: Callable[..., Config]) -> None:
    config = guarded("often", {"train.spike": {**GUARDED["train.spike"], "most": 1}})
    with pytest.raises(DivergedError, match=r"went back train\.spike\.most=1 times") as caught:
        train(config)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_data_that_end_before_the_run_are_refused_and_nothing_is_undone(
    guarded: Callable[..., Config], tiny_mapping: dict[str, Any]
) -> None:
    phase = {"until_tokens": STEPS * BATCH * 32, "mixture": tiny_mapping["data"]["mixture"]}
    data = {"data.mixture": [], "data.phases": [phase]}
    config = guarded("short", data)
    with pytest.raises(ConfigError, match=r"data\.phases: .* the run takes 2,048; raise it"):
        train(config)
    assert newest(config).manifest.state["step"] == 9
    phase["until_tokens"] *= 2
    assert train(guarded("short", data)) == 0


def test_off_it_keeps_nothing(make_config: MakeConfig) -> None:
    config = make_config()
    assert train(config) == 0
    state = newest(config).manifest.state
    assert (state["losses"], state["skips"], state["rewinds"]) == ([], [], 0)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"checkpoint.every": 0}, r"train\.spike: goes back .* set checkpoint\.every"),
        (
            {"checkpoint.keep": 4},
            r"train\.spike\.rewind=5: .*keep=4 every 1 .*give at most 4, .*keep to 5",
        ),
        ({"train.spike": {"factor": 1.0}}, r"train\.spike\.factor=1\.0: is too small"),
        ({"train.spike": {}}, r"train\.spike\.factor: is missing"),
    ],
)
def test_what_cannot_work_is_refused(
    make_config: MakeConfig, changes: dict[str, Any], words: str
) -> None:
    guarded = {**GUARDED, "train.spike": {"factor": 1.1, "rewind": 5}}
    with pytest.raises(ConfigError, match=words):
        make_config({**guarded, **changes})
    make_config(guarded)


def test_what_it_may_go_back_to(guarded: Callable[..., Config]) -> None:
    """Every third step is saved, three are kept, and the others were left by stops."""
    config = guarded("any", {"checkpoint.every": 3, "checkpoint.keep": 3})

    def paths(*steps: int) -> list[Path]:
        return [Path(f"step-{step:08d}") for step in steps]

    finished = paths(3, 6, 7, 8, 9, 11, 12, 13)
    assert targets(config, finished, 14) == paths(9, 6)
    assert targets(config, finished, 9) == paths(3), "not what lies ahead, found damaged"
    assert targets(config, paths(6, 9, 12), 9) == paths(6)
    assert kept_for(config, finished) == 7
    assert kept_for(config, paths(4, 5)) == 2
    assert targets(config, paths(4, 5), 6) == []


def test_ranges_that_touch_are_one() -> None:
    assert joined([], [3, 5]) == [[3, 5]]
    assert joined([[3, 5]], [5, 9]) == [[3, 9]]
    assert joined([[3, 5]], [6, 9]) == [[3, 5], [6, 9]]
