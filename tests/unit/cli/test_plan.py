"""`megallama plan`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megallama.cli.main import main
from megallama.config.load import load_config
from megallama.plan.hardware import load_hardware
from megallama.plan.predict import predict
from megallama.spec.flops import flops_per_token, flops_per_token_6n
from megallama.spec.grid import make_grid
from megallama.spec.memory import held_bytes
from megallama.spec.workspaces import Device
from tests.unit.plan.machines import changed

Captured = pytest.CaptureFixture[str]
CONFIGS = Path(__file__).parents[3] / "configs"
WORDS = ["plan", str(CONFIGS / "llama-7b.yaml"), "--gpus", "16", "--gpu", "a100-80gb"]
LAYOUT = [
    "parallel.tensor=2",
    "parallel.pipeline=2",
    "train.global_batch=64",
    "train.micro_batch=1",
]
KEYS = {
    "parallel",
    "train",
    "train.micro_batch",
    "train.saved_activations",
    "memory_bytes",
    "allocator_slack_bytes",
    "libraries_bytes",
    "step_seconds",
    "tokens_per_second_per_gpu",
    "mfu",
    "mfu_6n",
    "compute_seconds",
    "exposed",
}


@pytest.fixture(autouse=True)
def hundred_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def written(words: list[str], tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "plan.json"
    assert main([*words, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_a_layout_s_figures(tmp_path: Path, capsys: Captured) -> None:
    """They are those of the ledger and of the prediction, and follow from each other."""
    words = [*WORDS, *LAYOUT, "--budget", "1e12"]
    found = written(words, tmp_path)
    config = load_config(WORDS[1], LAYOUT)
    grid = make_grid(config, 16)
    best = found["best"]
    assert set(best) == KEYS
    assert found["candidates"] == [best]
    assert found["predicted"] is True
    assert found["fits"] is True
    assert best["parallel"]["data"] == 4
    assert best["parallel"]["virtual_stages"] == 1
    assert best["train"] == {"micro_batch": config.train.micro_batch,
                             "saved_activations": "linear_outputs"}  # fmt: skip
    assert best["train.micro_batch"] == best["train"]["micro_batch"]
    assert best["memory_bytes"] == sum(held_bytes(config, grid, Device("cuda")).values())
    assert best["memory_bytes"] == max(stage["memory_bytes"] for stage in found["stages"])
    for stage in found["stages"]:
        assert sum(stage["items"].values()) == stage["memory_bytes"]
    assert sorted(layer for s in found["stages"] for c in s["layers"] for layer in c) == [
        *range(32)
    ]

    seconds = predict(config, load_hardware("a100-80gb"), 16).step_seconds
    assert best["step_seconds"] == pytest.approx(seconds)
    tokens = config.train.global_batch * config.train.sequence_length
    rate = tokens / seconds / 16
    assert best["tokens_per_second_per_gpu"] == pytest.approx(rate)
    assert best["mfu"] == pytest.approx(rate * flops_per_token(config.model, 2048) / 312e12)
    assert best["mfu_6n"] == pytest.approx(rate * flops_per_token_6n(6_738_415_616) / 312e12)
    whole = best["compute_seconds"] + sum(best["exposed"].values())
    assert whole == pytest.approx(best["step_seconds"])
    assert found["budget"]["tokens"] == 1e12
    assert found["budget"]["gpu_hours"] == pytest.approx(1e12 / rate / 3600)
    assert found["budget"]["days"] == pytest.approx(1e12 / rate / 3600 / 16 / 24)

    slower = changed(load_hardware("a100-80gb"), {"network.bandwidth": 0.5})
    congested = predict(config, slower, 16)
    assert found["congested"] == {
        "network_share": 0.5,
        "step_seconds": pytest.approx(congested.step_seconds),
        "tokens_per_second_per_gpu": pytest.approx(congested.tokens_per_second_per_gpu),
    }
    assert congested.step_seconds > seconds

    out = capsys.readouterr().out
    rates = congested.tokens_per_second_per_gpu, 1 - seconds / congested.step_seconds
    line = "with 50% of the network's bandwidth: {:,.1f} tokens/s/GPU ({:.1%} less)"
    assert line.format(*rates) in out
    assert "every figure of time is predicted, none measured" in out
    assert f"predicted tokens/s/GPU  {rate:,.1f}" in out
    assert f"predicted for 1T tokens: {found['budget']['days']:,.1f} days" in out
    for line in ("gradients", "allocator slack (assumed)", "driver and libraries (assumed)"):
        assert line in out
    assert "fits: " in out
    assert max(map(len, out.splitlines())) <= 100


def test_inside_a_node_no_network_is_congested(tmp_path: Path, capsys: Captured) -> None:
    words = ["plan", WORDS[1], "--gpus", "8", "--gpu", "a100-80gb", "parallel.tensor=2"]
    assert written(words, tmp_path)["congested"] is None
    assert "of the network's" not in capsys.readouterr().out


def test_what_does_not_fit_says_what_would(tmp_path: Path, capsys: Captured) -> None:
    """An answer, not an error; and the change it names does fit."""
    words = [*WORDS, "parallel.tensor=1", "train.micro_batch=16", "train.global_batch=256"]
    found = written(words, tmp_path)
    assert found["fits"] is False
    assert found["best"]["memory_bytes"] > found["capacity_bytes"]
    assert found["change_that_fits"].startswith("with train.")
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("does not fit"))
    change = found["change_that_fits"].split()[1]
    assert change in line
    assert written([*words, change], tmp_path)["fits"] is True


def test_where_nothing_fits(tmp_path: Path, capsys: Captured) -> None:
    """No change of layout makes a sequence of four million tokens fit."""
    words = ["plan", WORDS[1], "--gpus", "1", "--gpu", "a100-80gb"]
    more = ["train.sequence_length=4194304", "train.global_batch=1", "train.micro_batch=1"]
    found = written([*words, *more, "parallel.tensor=1"], tmp_path)
    assert found["fits"] is False
    out = capsys.readouterr().out
    assert "does not fit" in out


SEARCH = [
    *WORDS, "--search", "train.global_batch=64", "parallel.overlap=backward",
    "train.saved_activations=linear_outputs",
]  # fmt: skip


def test_a_search_writes_a_config_that_plans_the_same(tmp_path: Path, capsys: Captured) -> None:
    best = tmp_path / "best.yaml"
    found = written([*SEARCH, "--write", str(best)], tmp_path)
    out = capsys.readouterr().out
    rates = [one["tokens_per_second_per_gpu"] for one in found["candidates"]]
    assert rates == sorted(rates, reverse=True)
    assert len(rates) >= 12
    first = found["candidates"][0]
    assert first.pop("on_front") is True
    assert first == found["best"]
    assert found["layouts_tried"] > found["layouts_predicted"] > len(rates)
    for one in found["candidates"]:
        assert one["parallel"]["overlap"] == "backward", "given on the command line"
        assert one["memory_bytes"] + one["allocator_slack_bytes"] <= found["capacity_bytes"]
        assert f"{one['tokens_per_second_per_gpu']:,.1f}" in out

    again = written(["plan", str(best), "--gpus", "16", "--gpu", "a100-80gb"], tmp_path)
    assert again["best"] == found["best"]


def test_the_trace_opens_and_is_the_step(tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "step.json"
    found = written([*WORDS, *LAYOUT, "--timeline", str(path)], tmp_path)
    events = json.loads(path.read_text())["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {0: "pp 0, predicted", 1: "pp 1, predicted"}
    lanes: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in (e for e in events if e["ph"] == "X"):
        lanes.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["dur"]))
    end = max(ts + dur for spans in lanes.values() for ts, dur in spans)
    assert end / 1e6 == pytest.approx(found["best"]["step_seconds"], rel=1e-3)
    passes = [e["name"] for e in events if e.get("tid") == 0 and e["ph"] == "X" and e["pid"] == 1]
    assert "F(1, 0)" in passes
    assert "BW(1, 7)" in passes


@pytest.mark.parametrize("more", [["parallel.pipeline=1"], ["parallel.schedule=zb-v"]])
def test_the_picture(more: list[str], tmp_path: Path, capsys: Captured) -> None:
    path = tmp_path / "step.png"
    assert main([*WORDS, *LAYOUT, *more, "--timeline", str(path)]) == 0
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert int.from_bytes(content[16:20], "big") == 1920


def test_advice(tmp_path: Path, capsys: Captured) -> None:
    hours = written([*WORDS, *LAYOUT, "--gpu-hours", "1e6", "--served", "2e12"], tmp_path)
    own, alone, served = hours["advice"]["models"]
    best, budget = hours["best"], hours["budget"]
    assert own["parameters"] == 6_738_415_616
    assert own["training_gpu_hours"] == pytest.approx(budget["gpu_hours"])
    assert alone["training_gpu_hours"] == pytest.approx(1e6)
    rate = best["tokens_per_second_per_gpu"] * 3600 * 6 * own["parameters"]
    assert served["training_flops"] + served["serving_flops"] == pytest.approx(1e6 * rate)
    for model in (own, alone, served):  # the tokens are served by whichever is trained
        assert model["serving_flops"] == pytest.approx(2 * model["parameters"] * 2e12)
    assert served["parameters"] < alone["parameters"]
    assert "arXiv 2404.10102" in capsys.readouterr().out

    words = [*WORDS, *LAYOUT, "--target-loss", "2.1", "--law", "hoffmann"]
    found = written(words, tmp_path)["advice"]
    assert found["law"]["E"] == 1.69
    assert [one["loss"] for one in found["models"][1:]] == [pytest.approx(2.1)]


@pytest.mark.parametrize(
    "words, line",
    [
        (["--gpu", "a1000"], "'a1000': is not known; use one of a100-80gb, cpu, h100, h200"),
        (["--gpus", "0"], "--gpus 0: give at least 1"),
        (["--gpus", "many"], "argument --gpus: invalid int value: 'many'"),
        (["--gpus", "17"], "--gpus 17: parallel.tensor=2: 17 processes do not make this grid"),
        (["--gpus", "17", "--search", "parallel.tensor=2"], "17 devices: no layout divides"),
        (["--gpus", "1", "--search", "parallel.tensor=1"], " GiB: none of 1"),
        (["train.global_batch=17"], "is not a multiple of train.micro_batch"),
        (["parallel.tensor=64"], "parallel.tensor=64: does not divide model.heads=32"),
        (["--budget", "-1"], "argument --budget: '-1' is not a positive number"),
        (["--budget", "nan"], "argument --budget: 'nan' is not a positive number"),
        (["--target-loss", "1.0"], "a loss of 1: the law of arXiv 2404.10102 ends at 1.8172"),
        (["--target-loss", "2", "--gpu-hours", "3"], "not allowed with argument --target-loss"),
        (["--served", "1e12"], "is for advice; give --target-loss or --gpu-hours too"),
        (["--law", "moore"], "argument --law: invalid choice: 'moore'"),
        (["--json", "/dev/null/x.json"], "cannot write /dev/null/x.json"),
        (["--timeline", "step.pdf"], "--timeline step.pdf: name a .json or a .png file"),
        (["--json", "x.json", "--timeline", "./x.json"], "x.json: is named for two outputs"),
        (["--write", WORDS[1]], "is read and would be written over"),
    ],
)
def test_what_is_refused(words: list[str], line: str, capsys: Captured) -> None:
    assert main([*WORDS, *LAYOUT[:1], *words]) == 78
    error = capsys.readouterr().err
    assert error.startswith("megallama: error: ")
    assert error.count("\n") == 1
    assert line in error


def test_a_negative_budget_may_be_written_apart(capsys: Captured) -> None:
    assert main([*WORDS, "--budget=-5e9"]) == 78
    assert "'-5e9' is not a positive number" in capsys.readouterr().err


def test_it_needs_no_torch(tmp_path: Path) -> None:
    script = (
        "import sys; from megallama.cli.main import main; code = main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    words = [*WORDS, *LAYOUT, "--timeline", str(tmp_path / "p.png")]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
