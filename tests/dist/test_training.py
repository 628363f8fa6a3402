"""`megallama train` in several processes: the numbers of one process, whatever stops it on the way.

First some runs are stopped or killed. Then they go on, in their own layout and in others, beside
runs that nothing stops, to the same last step.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megallama.checkpoint.store import Checkpoint
from megallama.train.metrics import Row
from tests.conftest import TinyData, losses
from tests.dist.commands import Command, last_step, runs, steps, write_config
from tests.dist.training import LAYOUTS, MOVES, SIZES, STOPS, STRAIGHT, TWICE, Bench


@pytest.fixture(scope="module")
def bench(tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("training")
    log = {"per_source": True, "layer_norms_every": 3}
    # Four layers: two chunks for each of two pipeline ranks.
    bench = Bench(folder, write_config(folder, tiny_data, log=log, model={"layers": 4}))
    bench.stop()
    bench.go_on()
    return bench


def numbers(row: Row) -> Iterator[tuple[str, float]]:
    """What a row says of the training, by name: all but its times and its memory."""
    timings = {"step_seconds", "memory_bytes"}
    for key, value in row.items():
        if key in timings or "per" in key.split("_"):
            if key in ("loss_per_source", "validation_loss_per_source"):
                yield from ((f"{key}.{name}", loss) for name, loss in value.items())
        elif key == "epochs":
            yield from ((f"{key}.{name}", epochs) for name, epochs in value.items())
        elif key == "layer_norms":
            for kind, norms in value.items():
                yield from ((f"{key}.{kind}.{i}", norm) for i, norm in enumerate(norms))
        elif value is not None:  # where the device's peak is unknown
            yield key, value


def assert_close(rows: list[Row], reference: list[Row], bound: float) -> None:
    """Every number of the rows lies within `bound`, relative, of the reference's."""
    assert [set(row) for row in rows] == [set(row) for row in reference]
    for row, wanted in zip(rows, reference, strict=True):
        got = dict(numbers(row))
        for name, value in numbers(wanted):
            assert math.isclose(got[name], value, rel_tol=bound), (row["step"], name)


def test_every_run_ends_well(bench: Bench) -> None:
    ends = {name: end for name, end in bench.ended.items() if name.endswith("to the end")}
    assert len(ends) == len(STRAIGHT) + len(STOPS) + len(MOVES)
    for name, end in ends.items():
        assert (end.code, end.error) == (0, ""), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_is_written_once(bench: Bench, layout: str) -> None:
    """One row a step, one line a step, one file a rank: not one a process."""
    rows = bench.rows(layout)
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, bench.last + 1))
    validated = sorted({*range(2, bench.last + 1, 2), bench.last})
    assert [r["step"] for r in rows if "validation_loss" in r] == validated
    lines = [line.split() for line in bench.ended[f"{layout}, to the end"].output.splitlines()]
    assert [int(n[0]) for n in lines if len(n) > 1 and n[1] == "validation"] == []
    shown = [int(n[0]) for n in lines if n[0].isdigit() and "validation" not in n]
    assert shown == list(range(1, bench.last + 1))
    assert sum("grad_norm" in n for n in lines) == (bench.last + 19) // 20
    directory = bench.newest(layout).directory
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    assert files == [f"rank-{rank:05d}.safetensors" for rank in range(SIZES[layout])]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_speeds_are_of_all_ranks_and_of_one(bench: Bench, layout: str) -> None:
    for row in steps(bench.run(layout)):
        whole = row["tokens_per_second"]
        assert math.isclose(row["tokens_per_second_per_gpu"], whole / SIZES[layout], rel_tol=1e-12)
        assert math.isclose(whole * row["step_seconds"], 4 * 32, rel_tol=1e-12)


@pytest.mark.parametrize("layout", [name for name in STRAIGHT if not name.startswith("one")])
def test_a_layout_has_the_numbers_of_one_process(bench: Bench, layout: str) -> None:
    """Losses, validation losses, norms of gradients and activations: to 1e-12 in fp64, and to 1e-6
    in fp32 over the six steps before differences have grown."""
    if layout.endswith("-fp32"):
        assert_close(bench.rows(layout), bench.rows("one-fp32"), 1e-6)
    else:
        assert_close(bench.rows(layout), bench.rows("one"), 1e-12)


@pytest.mark.parametrize("layout", [name for name in STRAIGHT if not name.startswith("one")])
def test_a_layout_ends_with_the_weights_of_one_process(bench: Bench, layout: str) -> None:
    fp32 = layout.endswith("-fp32")
    ours = bench.newest(layout)
    reference = bench.newest("one-fp32" if fp32 else "one")
    assert set(ours.manifest.tensors) == set(reference.manifest.tensors)
    for name in reference.manifest.tensors:
        wanted, got = reference.read(name), ours.read(name)
        assert got.dtype == wanted.dtype == (torch.float32 if fp32 else torch.float64)
        bound = 1e-4 if fp32 else 1e-11
        assert (got - wanted).norm() <= bound * wanted.norm(), name


def test_overlap_changes_no_bit(bench: Bench) -> None:
    assert losses(bench.run("grid-none")) == losses(bench.run("grid"))
    assert contents(bench.newest("grid-none")) == contents(bench.newest("grid"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_holds_every_element_once(bench: Bench, layout: str) -> None:
    checkpoint = bench.newest(layout)
    checkpoint.verify()
    reference = bench.newest("one").manifest.tensors
    for name, entry in checkpoint.manifest.tensors.items():
        assert (entry.shape, entry.dtype) == (reference[name].shape, reference[name].dtype)
        written = torch.zeros(entry.shape, dtype=torch.int64)
        for piece in entry.slices:
            written[
                tuple(slice(a, a + n) for a, n in zip(piece.start, piece.shape, strict=True))
            ] += 1
        assert (written == 1).all(), name


def test_text_is_generated_from_what_four_ranks_saved(bench: Bench) -> None:
    words = ("--prompt", "def x", "--tokens", "5")
    texts = []
    for name in ("grid", "stages", "one"):
        command = Command(
            bench.folder / "generate" / name, ["generate", str(bench.run(name)), *words]
        )
        code, output, error = command.end()
        assert (code, error) == (0, "")
        texts.append(output)
    assert texts[0] == texts[1] == texts[2]
    assert texts[0].startswith("def x")


@pytest.mark.parametrize("name", STOPS)
def test_how_a_stop_ends(bench: Bench, name: str) -> None:
    stop, end = STOPS[name], bench.ended[name]
    assert end.code == stop.code, end.error
    assert not any(runs(pid) for pid in bench.workers[name])
    assert [row["step"] for row in steps(bench.run(name))][: stop.step] == list(
        range(1, stop.step + 1)
    )
    if stop.number == signal.SIGKILL:
        wanted = rf"megallama: error: rank {stop.worker} was killed by SIGKILL, [^\n]*\n"
        assert re.fullmatch(wanted, end.error)
    else:
        assert end.error == ""


@pytest.mark.parametrize("name", STOPS)
def test_a_stopped_run_goes_on_with_the_same_bits(bench: Bench, name: str) -> None:
    straight = STOPS[name].layout
    assert losses(bench.run(name)) == losses(bench.run(straight))
    assert contents(bench.newest(name)) == contents(bench.newest(straight))


@pytest.mark.parametrize("name", [name for name in STOPS if STOPS[name].code != 69])
def test_a_stopped_run_goes_on_where_it_stopped(bench: Bench, name: str) -> None:
    step = bench.stopped_at[name]
    output = bench.ended[f"{name}, to the end"].output
    assert f"checkpoints/step-{step:08d}\n" in output
    assert f"step {step} of {bench.last}\n" in output


@pytest.mark.parametrize("name", MOVES)
def test_a_run_goes_on_in_another_layout(bench: Bench, name: str) -> None:
    """Its rows are those of a run in one layout: the same samples, and the same numbers."""
    assert "resumed from" in bench.ended[f"{name}, to the end"].output
    assert_close(bench.rows(name), bench.rows("one"), 1e-12)
    ours, reference = bench.newest(name), bench.newest("one")
    ours.verify()
    assert ours.manifest.state == reference.manifest.state
    for tensor in reference.manifest.tensors:
        wanted = reference.read(tensor)
        assert (ours.read(tensor) - wanted).norm() <= 1e-11 * wanted.norm(), tensor


def test_a_pipeline_alone_changes_no_bit(bench: Bench) -> None:
    """Losses, validation losses and norms, of every row; and the weights, moments too."""
    assert losses(bench.run("pipeline")) == losses(bench.run("one"))
    ours, reference = bench.newest("pipeline"), bench.newest("one")
    assert len(list(ours.directory.glob("*.safetensors"))) == 2
    for name in reference.manifest.tensors:
        assert torch.equal(ours.read(name), reference.read(name)), name


def test_a_run_moves_on_from_layout_to_layout(bench: Bench) -> None:
    """From pipeline and tensor ranks to data ranks, and from those to tensor ranks."""
    for layout, last in (("data", bench.last - 1), ("tensor", bench.last)):
        command = bench.start(layout, TWICE, f"train.steps={last}", *LAYOUTS[layout])
        code, output, error = command.end()
        assert (code, error) == (0, "")
        assert "resumed from" in output
        assert last_step(bench.run(TWICE)) == last
    wanted = [row for row in bench.rows("one") if row["step"] != bench.last - 1]
    rows = [row for row in bench.rows(TWICE) if row["step"] != bench.last - 1]
    assert_close(rows, wanted, 1e-12)  # the first run validates at its last step, too


def contents(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(checkpoint.directory.glob("*.safetensors"))}


def test_torchrun_starts_the_same_command(bench: Bench) -> None:
    """With real processes, from the interpreter's start."""
    script = "from megallama.cli.main import main; raise SystemExit(main())"
    path = bench.folder / "command.py"
    path.write_text(script)
    name = "torchrun"
    command: list[Any] = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", 2, path, "train", bench.config, f"run.name={name}"]
    command += ["parallel.tensor=2", f"train.steps={bench.last}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(word) for word in command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert losses(bench.run(name)) == losses(bench.run("tensor"))
    assert contents(bench.newest(name)) == contents(bench.newest("tensor"))
    assert done.stdout.count("grad_norm") == (bench.last + 19) // 20
