"""The report: one picture, one self-contained page, from whatever a run has left behind."""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import yaml

from megallama.cli import report as command
from megallama.errors import ConfigError
from megallama.train.metrics import MetricsWriter
from megallama.train.picture import half_window, smooth, thin
from megallama.train.record import count_parameters, read_run, summarise, unigram_entropy
from megallama.train.report import render_page, write_report


def written(run_dir: Path) -> Path:
    """The page, as `megallama report RUN_DIR` writes it."""
    return write_report(run_dir, read_run(run_dir))


MODEL = {"d_model": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 160, "vocab": 512}
# Embedding and output; q and o; k and v; w1, w2 and w3; two norms a layer; the last norm.
PARAMETERS = 2 * 512 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 160 + 2 * 64) + 64


def step_row(step: int, **values: Any) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": step * 1024,
        "loss": 2.0 + 4.0 / step,
        "grad_norm": 1.0 / step,
        "lr": 1e-3,
        "step_seconds": 0.5,
        "tokens_per_second": 2048.0 if step > 1 else 100.0,
        "tokens_per_second_per_gpu": 1024.0,
        "tflops_per_gpu": 0.5,
        "mfu": 0.41,
        "mfu_6n": 0.4,
        "memory_bytes": 2**30,
        **values,
    }


def validation_row(step: int, loss: float) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": step * 1024,
        "validation_loss": loss,
        "validation_loss_per_source": {"web": loss - 0.25, "code": loss + 0.25},
    }


def make_run(
    directory: Path, rows: list[dict[str, Any]], config: dict[str, Any] | None = None
) -> Path:
    with MetricsWriter(directory / "metrics.jsonl") as writer:
        for row in rows:
            writer.write(row)
    if config is not None:
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return directory


def source(prefix: Path, entropy: float | None, weight: float = 1.0) -> dict[str, Any]:
    if entropy is not None:
        Path(f"{prefix}.json").write_text(json.dumps({"unigram_entropy_nats": entropy}))
    return {"name": prefix.name, "path": str(prefix), "weight": weight}


class Page(HTMLParser):
    """The tags, the attributes that load something, and the table's cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.cells: list[str] = []
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for key, value in attrs if key in ("src", "href", "srcset")]
        self._cell = tag in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.cells.append(data)
            self._cell = False

    @property
    def table(self) -> dict[str, str]:
        return dict(zip(self.cells[::2], self.cells[1::2], strict=True))


def picture_of(page: Path) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(page.with_name("loss.png").read_bytes()))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = []
    for step in range(1, 201):
        rows.append(step_row(step))
        if step % 50 == 0:
            rows.append(validation_row(step, 3.0 + 1 / step))
    config = {
        "run": {"name": "demo <1>"},
        "model": MODEL,
        "data": {"mixture": [source(tmp_path / "web", 5.5)]},
    }
    return make_run(tmp_path / "demo", rows, config)


def test_the_page_holds_all_it_shows(run_dir: Path) -> None:
    page = written(run_dir)
    assert page == run_dir / "report" / "index.html"
    text = page.read_text()
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r"base64,[^\"]*", "", text))
    parsed = Page(text)
    assert {"script", "link", "iframe"}.isdisjoint(parsed.tags)
    (picture,) = parsed.loads
    head, _, encoded = picture.partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(encoded) == page.with_name("loss.png").read_bytes()


def test_the_table_holds_the_runs_figures(run_dir: Path) -> None:
    page = Page(written(run_dir).read_text())
    assert page.table == {
        "final loss": "2.0200 nats",
        "validation loss": "3.0050 nats",
        "validation loss, web": "2.7550 nats",
        "validation loss, code": "3.2550 nats",
        "unigram entropy of the corpus": "5.5000 nats",
        "steps": "200",
        "tokens": "204,800",
        "median step": "0.5 s",
        "median tokens/s": "2,048",
        "median tokens/s/GPU": "1,024",
        "median TFLOP/s/GPU": "0.5",
        "median MFU": "41.0%",
        "peak memory": "1.00 GiB",
        "model": "2 layers, 64 wide, 4 heads, 512 vocabulary",
        "parameters": f"{PARAMETERS:,}",
    }


def test_names_are_escaped(run_dir: Path) -> None:
    text = written(run_dir).read_text()
    assert "demo &lt;1&gt;" in text
    assert "<1>" not in text


def test_the_picture_has_four_panels(run_dir: Path) -> None:
    pixels = picture_of(written(run_dir))
    height, width = pixels.shape[:2]
    assert width >= 1200
    curve = np.abs(pixels[..., :3] - np.array([0x1F, 0x5F, 0xA8]) / 255).max(axis=2) < 0.1
    assert curve[: height // 2].any()
    for left in (0, width // 3, 2 * width // 3):
        assert curve[2 * height // 3 :, left : left + width // 3].any()


def test_the_entropy_line_and_the_validation_points_are_drawn(tmp_path: Path) -> None:
    rows = [step_row(step) for step in range(1, 31)]
    config = {"data": {"mixture": [source(tmp_path / "web", 5.5)]}}
    bare = picture_of(written(make_run(tmp_path / "bare", rows)))
    full = picture_of(
        written(make_run(tmp_path / "full", [*rows, validation_row(20, 3.0)], config))
    )

    def count(pixels: np.ndarray, color: tuple[int, int, int]) -> int:
        near = np.abs(pixels[..., :3] - np.array(color) / 255).max(axis=2) < 0.02
        return int(near.sum())

    orange = (0xD9, 0x69, 0x1E)
    assert count(bare, orange) == 0
    assert count(full, orange) > 20
    grey = (0x6B, 0x77, 0x85)
    assert count(full, grey) > count(bare, grey) + 500


def test_a_run_resumed_without_truncation_counts_each_step_once(tmp_path: Path) -> None:
    rows = [step_row(step) for step in range(1, 31)] + [validation_row(30, 9.0)]
    rows += [step_row(step, loss=1.0) for step in range(21, 31)] + [validation_row(30, 1.5)]
    run = read_run(make_run(tmp_path / "run", rows))
    assert [row["step"] for row in run.steps] == list(range(1, 31))
    assert [row["loss"] for row in run.steps[19:22]] == [2.2, 1.0, 1.0]
    assert summarise(run)["validation_loss"] == 1.5
    written(tmp_path / "run")


def test_one_step_makes_a_report(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", [step_row(1)])
    page = Page(written(run_dir).read_text())
    assert page.table["final loss"] == "6.0000 nats"
    assert page.table["median tokens/s"] == "100"
    assert "validation loss" not in page.table
    assert "parameters" not in page.table
    assert picture_of(run_dir / "report" / "index.html").shape[1] >= 1200


def test_the_median_leaves_the_first_step_out(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", [step_row(1), step_row(2)]))
    assert summarise(run)["median_tokens_per_second"] == 2048.0


def test_unknown_utilisation_is_left_out(tmp_path: Path) -> None:
    rows = [step_row(s, mfu=None, mfu_6n=None, tflops_per_gpu=None) for s in range(1, 151)]
    page = Page(written(make_run(tmp_path / "run", rows)).read_text())
    assert "median MFU" not in page.table
    assert "median TFLOP/s/GPU" not in page.table
    assert page.table["median tokens/s"] == "2,048"


@pytest.mark.parametrize("count", [5, 150])
def test_a_diverged_run_makes_a_report(tmp_path: Path, count: int) -> None:
    rows = [step_row(step) for step in range(1, count + 1)]
    rows += [step_row(count + i, loss=math.nan, grad_norm=math.inf) for i in range(1, 4)]
    run_dir = make_run(tmp_path / "run", rows)
    page = Page(written(run_dir).read_text())
    assert page.table["final loss"] == f"{2 + 4 / count:.4f} nats"
    assert page.table["steps"] == str(count + 3)


def test_a_run_of_nulls_makes_a_report(tmp_path: Path) -> None:
    row = dict.fromkeys(step_row(1)) | {"step": 1}
    page = Page(written(make_run(tmp_path / "run", [row])).read_text())
    assert page.table == {"steps": "1"}


def test_a_name_with_dollar_signs_is_drawn_as_it_is(tmp_path: Path) -> None:
    page = written(make_run(tmp_path / "a$_{$", [step_row(1)]))
    assert "<h1>a$_{$</h1>" in page.read_text()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda path: None, "no run directory"),
        (lambda path: path.mkdir(), "no metrics.jsonl"),
        (lambda path: make_run(path, []), "no step yet"),
        (lambda path: make_run(path, [validation_row(0, 3.0)]), "no step yet"),
    ],
)
def test_a_directory_without_a_run_is_named(tmp_path: Path, make: Any, words: str) -> None:
    make(tmp_path / "demo")
    with pytest.raises(ConfigError, match=words) as caught:
        written(tmp_path / "demo")
    assert str(tmp_path / "demo") in str(caught.value)
    assert ": " in str(caught.value)  # and the way out
    assert not (tmp_path / "demo" / "report").exists()


def test_a_broken_config_is_named(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "demo", [step_row(1)])
    (run_dir / "config.yaml").write_text("run: [")
    with pytest.raises(ConfigError, match=r"config\.yaml line 1: not YAML"):
        written(run_dir)


@pytest.mark.parametrize(
    "content", ["run: {name: 2026-13-45}", "a: " + "[" * 5000, "\0", "a: &a [*a]"]
)
def test_a_config_that_cannot_be_loaded_is_named(tmp_path: Path, content: str) -> None:
    run_dir = make_run(tmp_path / "demo", [step_row(1)])
    (run_dir / "config.yaml").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml") as refusal:
        written(run_dir)
    assert "\n" not in str(refusal.value)


def test_a_config_that_is_a_folder_is_named(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "demo", [step_row(1)])
    (run_dir / "config.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"config\.yaml: Is a directory"):
        written(run_dir)


@pytest.mark.parametrize(
    "config",
    [
        {"data": {"mixture": 7}},
        {"data": {"mixture": [7]}},
        {"data": {"mixture": [{"path": "web", "weight": "x"}]}},
        {"data": {"mixture": [{"path": "web", "weight": 0}]}},
        {"data": {"mixture": [{"path": 7}]}},
        {"data": {"phases": 7}},
        {"data": {"phases": [7]}},
        {"data": {"phases": [{"until_tokens": "abc", "mixture": []}]}},
        {"run": {"name": "a\0b\n" * 9}, "model": {1: [2], "layers": {"a": 1}}},
        {"model": {"layers": math.nan, "heads": "\ud800"}, "data": 3},
    ],
)
def test_a_config_edited_by_hand_leaves_figures_out(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source(Path("web"), 5.5)
    run_dir = make_run(tmp_path / "demo", [step_row(1)], config)
    assert command.run(parse(str(run_dir), "--json", str(tmp_path / "figures.json"))) == 0
    page = Page((run_dir / "report" / "index.html").read_text())
    assert page.table["final loss"] == "6.0000 nats"
    assert "unigram entropy of the corpus" not in page.table


@pytest.mark.parametrize("entropy", ["5.5", "NaN", "Infinity", "1e308", '"x"', "null"])
def test_an_entropy_that_is_no_figure_is_left_out(tmp_path: Path, entropy: str) -> None:
    web = source(tmp_path / "web", None)
    (tmp_path / "web.json").write_text(f'{{"unigram_entropy_nats": {entropy}}}')
    assert unigram_entropy({"mixture": [web]}, 10) == (5.5 if entropy == "5.5" else None)


@pytest.mark.parametrize(
    "value",
    ["abc", [1], {"a": 1}, True, 1e308, -1e308, 10**400, "\ud800"],
    ids=lambda v: str(v)[:6],
)
def test_rows_edited_by_hand_are_gaps(tmp_path: Path, value: Any) -> None:
    odd = dict.fromkeys(step_row(1), value)
    rows = [{**odd, "step": 1}, step_row(2), {**odd, "step": 3}]
    odd_validation = dict.fromkeys(validation_row(1, 1.0), value)
    rows += [validation_row(2, 3.0), {**odd_validation, "step": 3}]
    rows += [{**validation_row(4, 3.0), "validation_loss_per_source": {"\ud800": value, "b": 1.0}}]
    run_dir = make_run(tmp_path / "demo", [])
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(written(run_dir).read_text())
    assert page.table["final loss"] == "4.0000 nats"
    assert page.table["validation loss"] == "3.0000 nats"
    assert page.table["median tokens/s"] == "2,048"


def test_a_validation_that_is_no_number_is_left_out(tmp_path: Path) -> None:
    row = {**validation_row(1, 3.0), "validation_loss": "abc", "validation_loss_per_source": [1]}
    page = Page(written(make_run(tmp_path / "demo", [step_row(1), row])).read_text())
    assert not [title for title in page.table if "validation" in title]


def test_a_report_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "demo", [step_row(1)])
    (run_dir / "report").write_text("a file")
    with pytest.raises(ConfigError, match=r"cannot write .*report"):
        written(run_dir)


def test_nothing_but_the_report_is_left(run_dir: Path) -> None:
    written(run_dir)
    written(run_dir)
    assert sorted(os.listdir(run_dir / "report")) == ["index.html", "loss.png"]


def test_entropy_is_weighted_by_the_mixture(tmp_path: Path) -> None:
    mixture = [source(tmp_path / "web.v1", 6.0, 3.0), source(tmp_path / "code", 4.0, 1.0)]
    assert unigram_entropy({"mixture": mixture}, 1000) == pytest.approx(5.5)


def test_entropy_is_weighted_by_the_phases_that_were_read(tmp_path: Path) -> None:
    web, code = source(tmp_path / "web", 6.0), source(tmp_path / "code", 4.0)
    phases = [{"until_tokens": 300, "mixture": [web]}, {"mixture": [code]}]
    assert unigram_entropy({"phases": phases}, 1000) == pytest.approx(0.3 * 6 + 0.7 * 4)
    assert unigram_entropy({"phases": phases}, 200) == 6.0
    assert unigram_entropy({"phases": phases}, 300) == 6.0


def test_entropy_is_unknown_where_a_source_has_none(tmp_path: Path) -> None:
    web, code = source(tmp_path / "web", 6.0), source(tmp_path / "code", None)
    assert unigram_entropy({"mixture": [web, code]}, 10) is None
    assert unigram_entropy({"mixture": []}, 10) is None
    assert unigram_entropy({}, 10) is None
    Path(f"{tmp_path / 'code'}.json").write_text("{}")
    assert unigram_entropy({"mixture": [web, code]}, 10) is None


def test_parameters_are_counted_from_the_shape() -> None:
    assert count_parameters(MODEL) == PARAMETERS
    assert count_parameters({**MODEL, "tie_embeddings": True}) == PARAMETERS - 512 * 64
    assert count_parameters({"layers": 2}) is None
    assert count_parameters({}) is None


def test_smoothing_keeps_a_line_and_drops_a_spike() -> None:
    line = np.linspace(5.0, 1.0, 1001)
    at, values = smooth(line, half_window(1001))
    inner = at < 1001 - 20  # the last windows are one-sided
    np.testing.assert_allclose(values[inner], line[at][inner], rtol=1e-12)
    assert at[0] == 0
    assert at[-1] == 1000
    spiky = line.copy()
    spiky[500] = 100.0
    assert np.abs(smooth(spiky, half_window(1001))[1] - values).max() < 0.01


def test_a_shorter_run_is_smoothed_as_the_longer_one_that_it_began_as() -> None:
    long = np.random.default_rng(0).normal(size=1000)
    long_at, long_values = smooth(long, half_window(1000))
    at, values = smooth(long[:200], half_window(1000))
    inner = at < 200 - 20  # the last windows are one-sided
    smoothed = dict(zip(long_at.tolist(), long_values.tolist(), strict=True))
    common = [
        (smoothed[i], v) for i, v in zip(at[inner], values[inner], strict=True) if i in smoothed
    ]
    assert len(common) > 100
    assert all(ours == theirs for ours, theirs in common)


def test_smoothing_leaves_gaps_out() -> None:
    values = np.full(300, 2.0)
    values[100:110] = math.nan
    values[200:] = math.nan
    at, smoothed = smooth(values, half_window(300))
    assert (smoothed[at < 200] == 2.0).all()
    assert np.isnan(smoothed[at > 210]).all()


def test_thinning_keeps_every_spike() -> None:
    values = np.zeros(100_000)
    spikes = [0, 9_999, 10_000, 54_321, 99_999]
    values[spikes] = [1, -2, 3, -4, 5]
    kept = thin(values)
    assert set(spikes) <= set(kept.tolist())
    assert len(kept) <= 8000
    assert (np.diff(kept) > 0).all()
    assert thin(np.zeros(500)).tolist() == list(range(500))


def test_a_page_for_a_picture_that_is_given(run_dir: Path) -> None:
    page = Page(render_page(read_run(run_dir), b"picture"))
    assert page.loads == ["data:image/png;base64,cGljdHVyZQ=="]


# The command


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def test_the_command_writes_the_report_and_the_figures(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = tmp_path / "figures.json"
    assert command.run(parse(str(run_dir), "--json", str(figures))) == 0
    assert capsys.readouterr().out == f"{run_dir / 'report' / 'index.html'}\n"
    assert (run_dir / "report" / "loss.png").exists()
    content = json.loads(figures.read_text())
    assert content["final_loss"] == 2.02
    assert content["parameters"] == PARAMETERS
    assert content["model"] == MODEL


def test_the_command_writes_over_nothing_that_it_reads(run_dir: Path) -> None:
    for name in ("metrics.jsonl", "config.yaml"):
        before = (run_dir / name).read_bytes()
        with pytest.raises(ConfigError, match=f"{name}: is read and would be written over"):
            command.run(parse(str(run_dir), "--json", str(run_dir / name)))
        assert (run_dir / name).read_bytes() == before


def test_the_command_names_a_json_path_that_cannot_be(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write .*nowhere.*figures\.json"):
        command.run(parse(str(run_dir), "--json", "/dev/null/nowhere/figures.json"))
