"""The benchmarks of steps, kernels and checkpoints run, on the CPU and at toy sizes."""

from __future__ import annotations

import math
import multiprocessing as mp
import threading
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


def test_tensor_memory_counts_what_is_live_at_the_peak():
    """Kept 4 and 2 MB; 8 and 1 MB of it temporary at once, and 5 at another time."""
    from tensor_memory import TensorMemory

    def megabytes(count: int) -> torch.Tensor:
        return torch.empty(count << 20, dtype=torch.uint8)

    memory = TensorMemory(torch.device("cpu"))
    kept = megabytes(4)
    before = megabytes(1)
    with memory.step():
        temporary = megabytes(8)
        del temporary
        temporary = megabytes(5)
        gradient = megabytes(2)
        del before, temporary
    after = megabytes(50)
    found = memory.figures({"parameters": [kept, kept.view(2, -1)], "gradients": [gradient]})
    del after
    sizes = {name: size / 2**20 for name, size in found.items()}
    rest = sizes.pop("activations, logits and workspaces")
    assert sizes == pytest.approx({"parameters": 4, "gradients": 2, "peak": 13}, abs=0.01)
    assert rest == pytest.approx(9, abs=0.01)


def test_a_contender_s_process_says_what_the_benchmark_asks():
    import training_step
    from contenders import Case

    case = Case(**training_step.SHAPES["tiny"].as_json() | {"precision": "fp32"})
    pipe, end = mp.Pipe()
    thread = threading.Thread(target=training_step.serve, args=(case, "megallama", end))
    thread.start()
    for _ in range(training_step.WARMUP):
        pipe.send(True)
        assert pipe.recv() is None
    tensors = pipe.recv()
    pipe.send(True)
    seconds, resident = pipe.recv()
    pipe.send(False)
    thread.join()
    parameters = 2 * (4 * 64 * 64 + 3 * 64 * 176 + 2 * 64) + 64 + 2 * 512 * 64
    # Each parameter begins at a multiple of 64 bytes; masters are the weights themselves.
    assert tensors["parameters"] == pytest.approx(4 * parameters, rel=0.01)
    assert tensors["gradients"] == tensors["parameters"]
    assert tensors["masters"] == 0
    assert tensors["moments"] == 2 * 4 * parameters
    assert 0 < tensors[training_step.REST] < tensors["peak"] < resident
    row = training_step.figures(case, [2 * seconds, 4 * seconds], [seconds, seconds])
    assert row["megallama_speedup"] == 3
    assert row["tokens_per_second"] == pytest.approx(case.tokens / (3 * seconds), abs=0.1)


@pytest.mark.parametrize("kind, compiled", [("bf16", False), ("autocast", False)])
def test_hugging_face_s_loss_is_that_of_an_untrained_model(kind, compiled):
    """ln V, so the peers do compute the loss of the same task; the first update is small."""
    from contenders import Case, HuggingFace, Megallama

    case = Case(64, 2, 2, 2, 176, 512, 64, 2, micro_batches=2)
    for contender in (HuggingFace(case, kind, compiled), Megallama(case)):
        assert contender.step() == pytest.approx(math.log(512), rel=0.05)
        assert contender.step() == pytest.approx(math.log(512), rel=0.05)
        assert {"parameters", "gradients", "moments"} <= contender.kept().keys()
        assert all(tensors for tensors in contender.kept().values())


def test_a_gpu_s_row_has_every_figure():
    from training_step_gpu import QUICK, Entry, add_speedups, entries, measure

    names = {(entry.name, entry.policy, entry.case.length) for entry in entries(QUICK)}
    assert len(names) >= 9
    row = measure(Entry("megallama", QUICK, "layer_input"))
    assert row["tokens_per_second"] > 0
    assert row["mfu"] is None, "no peak is known of a CPU"
    assert row["peak_memory_bytes"] > row["bytes_of_parameters_gradients_and_optimizer"] > 0
    about = {"policy": "linear_outputs", "shape": {}}
    rows = [about | {"name": "megallama", "tokens_per_second": 30}]
    rows.append(about | {"name": "peer", "policy": None, "tokens_per_second": 20})
    rows.append(about | {"name": "dead", "policy": None, "left_out": "why"})
    add_speedups(rows)
    assert [row.get("megallama_speedup") for row in rows] == [1, 1.5, None]


def test_every_kernel_is_in_the_benchmark():
    from kernels_gpu import Sizes, compare, contests, copying, gemm

    sizes = Sizes(torch.device("cpu"), quick=True)
    found = list(contests(sizes))
    assert len({contest.op for contest in found}) == 12
    assert gemm(64, sizes)["size"] == 64
    copy = copying(sizes)
    for contest in found:
        row = compare(contest, sizes, copy)
        assert row["bytes"] == contest.size
        assert {"kernel_gb_per_second", "copy_gb_per_second", "share_of_copy"} <= row.keys()
        operands = [x for x in contest.operands() if isinstance(x, torch.Tensor)]
        # Bytes that are moved are those of the operands, of which a result may be one as well.
        assert contest.size <= 2 * sum(x.nbytes for x in operands)


def test_checkpoints_are_compared_with_a_raw_copy_and_dcp(tmp_path: Path):
    """Two processes; each way to load is found to bring every bit back, or the ranks die."""
    from checkpoint_rank import BEHIND, LOADED_FROM, SAVES
    from checkpoints import QUICK, measure

    row = measure(2, 1, str(tmp_path / "written"), quick=True)
    parameters = 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64 + 2 * QUICK["vocab"] * 64
    assert row["gib"] == pytest.approx(3 * 4 * parameters / 2**30, abs=1e-4)
    assert (row["saves"].keys(), row["behind_the_steps"].keys()) == (SAVES.keys(), BEHIND.keys())
    assert row["cold_loads"].keys() == row["warm_loads"].keys() == LOADED_FROM.keys()
    for part in ("saves", "cold_loads", "warm_loads"):
        assert row[part]["raw"]["speed_over_raw"] == row[part]["dcp"]["speed_over_dcp"] == 1
    assert not any((tmp_path / "written").iterdir())


def test_ranks_of_a_benchmark_end_no_process_of_others():
    from pipeline_rank import Ranks

    here, there = mp.get_context("fork").Pipe()
    other = mp.get_context("fork").Process(target=there.recv, daemon=True)
    other.start()
    with Ranks(0):
        pass
    assert other.is_alive()
    here.send("the end")
    other.join()
    assert other.exitcode == 0


def test_a_share_of_an_interval_and_ratios_by_hand():
    from checkpoints import behind_figures, figures, ratio

    found = {"none": [(0.0, 5.0, 5.0), (0.0, 6.0, 6.0)], "a": [(0.6, 7.0, 9.0), (1.2, 7.2, 9.0)]}
    row = behind_figures(found, "a", 0.5)
    assert row["held_seconds"]["median"] == 0.9
    assert row["held_seconds_per_gib_of_a_rank"] == 1.8
    assert row["held_share_of_10_minutes"] == pytest.approx(0.0015)
    assert row["slowed_seconds"]["rounds"] == [1.4, 0.0]
    assert row["held_and_slowed_share_of_10_minutes"] == pytest.approx(1.6 / 600, abs=1e-6)
    seconds = {"raw": [1.0, 2.0, 3.0], "dcp": [8.0, 4.0, 6.0], "a": [2.0, 2.0, 2.0]}
    assert figures(seconds, "a", 4.0)["gib_per_second"] == 2
    assert figures(seconds, "a", 4.0)["speed_over_raw"] == 1
    assert ratio(seconds["dcp"], seconds["a"]) == 3
