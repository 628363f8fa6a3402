"""`megallama schedule`: the drawing, the figures, the files, and what is refused."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from megallama.cli.main import main
from megallama.cli.schedule_text import SHADES, row, show
from megallama.config.schedules import default_virtual_stages
from megallama.spec.schedules.build import NAMES, make_schedule
from megallama.spec.schedules.simulate import simulate

Captured = pytest.CaptureFixture[str]
WORDS = ["schedule", "--name", "zb-h1", "--stages", "4", "--microbatches", "8"]


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def test_the_timeline_by_hand(capsys: Captured) -> None:
    """Piped, so without colour: kinds are letters, and a blank or a dot is no pass."""
    assert main(WORDS) == 0
    out = capsys.readouterr().out
    assert [line.rstrip() for line in out.splitlines()[:5]] == [
        "rank 0 F0F1F2F3······BW0 F4BW1 F5BW2 F6BW3 F7BW4 BW5 BW6 BW7",
        "rank 1 ··F0F1F2····B0F3B1W0F4B2W1F5B3W2F6B4W3F7B5W4B6W5B7W6W7",
        "rank 2 ····F0F1··B0F2B1F3B2W0F4B3W1F5B4W2F6B5W3F7B6W4B7W5W6W7",
        "rank 3 ······F0B0F1B1F2B2F3B3W0F4B4W1F5B5W2F6B6W3F7B7W4W5W6W7",
        "     0 ─────────────────────────────────────────────────── 27",
    ]
    assert "\x1b" not in out
    figures = [line.split() for line in out.splitlines()]
    assert ["bubble", "fraction", "0.1111"] in figures  # 1 - 24/27
    assert ["makespan", "27"] in figures
    for rank, (held, states) in enumerate([(4, 0), (3, 2), (2, 3), (1, 4)]):
        assert [str(rank), str(held), str(states), str(held)] in figures


@pytest.mark.parametrize("columns", [24, 40, 80, 200])
@pytest.mark.parametrize("name", NAMES)
def test_it_fits_the_terminal(
    name: str, columns: int, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for stages, micro_batches in ((1, 1), (4, 8), (8, 40)):
        words = ["schedule", "--name", name, "--stages", stages, "--microbatches", micro_batches]
        assert main([*map(str, words), "--forward", "1.5"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= columns
        ranks = [line for line in lines if line.startswith("rank ") and "held" not in line]
        assert len([line for line in ranks if line.split()[1].isdigit()]) == stages


def test_columns_are_coloured_by_kind_and_chunk() -> None:
    """A whole backward has both colours, each as long as it takes; a second chunk has its own."""
    times = (1.0, 2.0, 1.0)
    simulation = simulate(make_schedule("zb-v", 1, 1, 2), *times)
    cells = list(row(simulation, times, 0, scale=6, coloured=True))
    assert "".join(text for text, _ in cells).split() == ["F0", "f0", "bw0", "BW0"]
    grounds = [style.rpartition(" ")[2] for _, style in cells]
    expected = [("F", 0, 3), ("F", 1, 3), ("B", 1, 6), ("W", 1, 3), ("B", 0, 6), ("W", 0, 3)]
    assert grounds == [SHADES[kind][chunk] for kind, chunk, width in expected for _ in range(width)]
    assert len({shade for shades in SHADES.values() for shade in shades}) == 12


def test_a_colour_terminal_gets_colours() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="truecolor", width=80)
    show(simulate(make_schedule("zb-h1", 4, 8)), (1.0, 1.0, 1.0), console)
    assert "\x1b[37;48;2;31;95;168mF0F1F2F3" in out.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_the_json_has_every_pass_and_the_figures(
    name: str, tmp_path: Path, capsys: Captured
) -> None:
    path = tmp_path / "new" / "figures.json"
    words = ["schedule", "--name", name, "--stages", "3", "--microbatches", "5"]
    assert main([*words, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    v = default_virtual_stages(name)
    named = {key: found[key] for key in ("name", "stages", "micro_batches", "virtual_stages")}
    assert named == {"name": name, "stages": 3, "micro_batches": 5, "virtual_stages": v}
    simulation = simulate(make_schedule(name, 3, 5, v))
    assert found["makespan"] == simulation.makespan
    assert found["bubble_fraction"] == simulation.bubble_fraction
    assert found["peak_in_flight"] == list(simulation.peak_in_flight)
    assert found["peak_weight_states"] == list(simulation.peak_weight_states)
    assert len(found["actions"]) == 3
    done = set()
    for rank in found["actions"]:
        work = 0.0
        for before, after in pairwise(rank):
            assert before["end"] <= after["start"] + 1e-12
        for each in rank:
            work += each["end"] - each["start"]
            assert each["end"] - each["start"] == pytest.approx(len(each["kind"]) / v)
            assert each["fused"] in (True, False)
            done |= {(kind, each["chunk"], each["micro_batch"]) for kind in each["kind"]}
        assert work == pytest.approx(15)
        span = rank[-1]["end"] - rank[0]["start"]
        assert found["bubble_fraction"] >= 1 - work / span - 1e-12
    assert len(done) == 3 * 5 * 3 * v
    assert any(each["fused"] for rank in found["actions"] for each in rank) == ("fused" in name)


@pytest.mark.parametrize("words", [[], ["--name", "zb-v"], ["--name", "interleaved-fused"]])
def test_the_picture(words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "schedule.png"
    assert main([*WORDS, *words, "--png", str(path)]) == 0
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    width = int.from_bytes(content[16:20], "big")
    assert width == 1920


def test_times_are_taken(tmp_path: Path) -> None:
    """ZB-H1's bubble, (p-1)(F+B-W), of a span of m(F+B+W) and that."""
    path = tmp_path / "f.json"
    times = ["--forward", "3", "--backward", "4", "--weight", "2"]
    assert main([*WORDS, *times, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["bubble_fraction"] == pytest.approx(15 / (72 + 15))
    assert found["makespan"] == 87


@pytest.mark.parametrize(
    "words, line",
    [
        (["--name", "zb"], "argument --name: invalid choice: 'zb'"),
        (["--virtual-stages", "2"], "schedule zb-h1 with 2 virtual stages: it takes 1"),
        (["--virtual-stages", "0"], "schedule zb-h1 with 0 virtual stages: give at least 1"),
        (["--stages", "0"], "schedule zb-h1 with 0 stages: give at least 1"),
        (["--stages", "two"], "argument --stages: invalid int value: 'two'"),
        (["--microbatches", "-1"], "schedule zb-h1 with -1 micro-batches: give at least 1"),
        (["--forward", "-1"], "argument --forward: '-1' is not a time; give 0, or 1e-09 to 1e+09"),
        (["--weight", "nan"], "argument --weight: 'nan' is not a time"),
        (["--forward", "0", "--backward", "0", "--weight", "0"], "one at least takes some time"),
        (["--json", "."], "cannot write"),
        (["--png", "/dev/null/x.png"], "cannot write /dev/null/x.png"),
        (["--json", "a", "--png", "./a"], "--json and --png a: are one file; name two"),
    ],
)
def test_what_is_refused(words: list[str], line: str, capsys: Captured) -> None:
    assert main([*WORDS, *words]) == 78
    error = capsys.readouterr().err
    assert error.startswith("megallama: error: ")
    assert error.count("\n") == 1
    assert line in error


def test_the_help_says_what_a_bubble_is(capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        main(["schedule", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "1 - a rank's work / the longest rank span" in out
    assert "post-validation" in out


def test_it_needs_no_torch(tmp_path: Path) -> None:
    """Planning is done on laptops, where importing torch takes seconds."""
    script = (
        "import sys; from megallama.cli.main import main; code = main(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    words = [*WORDS, "--png", str(tmp_path / "p.png"), "--json", str(tmp_path / "f.json")]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
