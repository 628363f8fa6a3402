"""A run that cannot fit is refused before it starts; one that runs out says what to do."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from megallama.cli.main import main
from megallama.config.schema import Config
from megallama.errors import EXIT_CONFIG, ConfigError
from megallama.spec.grid import Grid, make_grid
from megallama.spec.memory import held_bytes
from megallama.spec.savings import changes, cheapest
from megallama.spec.workspaces import Device
from megallama.train import memory
from megallama.train.memory import (
    SLACK,
    Room,
    explained_shortage,
    free_memory,
    ledger_lines,
    needed,
    refuse_too_large,
    verdict,
)
from megallama.train.process import ALONE, Process
from megallama.train.step import TrainStep
from tests.conftest import ConfigFile, MakeConfig

CPU = torch.device("cpu")


def room_of(size: int, ranks: int = 1) -> Room:
    return Room(CPU, size, tuple(range(ranks)))


def total(config: Config, grid: Grid) -> int:
    return sum(held_bytes(config, grid).values())


@pytest.fixture
def config(make_config: MakeConfig) -> Config:
    """Activations are most of it, so that there is something to save."""
    keys = {"micro_batch": 4, "global_batch": 4, "saved_activations": "all"}
    return make_config({f"train.{key}": value for key, value in keys.items()})


def test_a_run_that_fits_passes(config: Config) -> None:
    need = total(config, Grid())
    assert verdict(config, Grid(), room_of(need)).startswith("it fits: ")


def test_one_that_may_fit_is_not_refused(config: Config) -> None:
    """The ledger may say up to 4% too much."""
    need = total(config, Grid())
    verdict(config, Grid(), room_of(int(need * (1 - SLACK)) + 1))
    with pytest.raises(ConfigError):
        verdict(config, Grid(), room_of(int(need * (1 - SLACK)) - 1))


def test_the_refusal_names_the_first_change_that_fits(config: Config) -> None:
    """Whatever the room, no change before the one named would fit, and it would itself."""
    offered = list(changes(config, Grid()))
    sizes = [total(change.config, change.grid) for change in offered]
    assert offered[0].text == "train.saved_activations=linear_outputs"
    named = set()
    for size in sizes:
        room = room_of(int(size * (1 - SLACK)) + 1)
        if total(config, Grid()) * (1 - SLACK) <= room.size:
            continue
        with pytest.raises(ConfigError) as refused:
            verdict(config, Grid(), room)
        first = next(n for n, s in enumerate(sizes) if s * (1 - SLACK) <= room.size)
        assert f"; with {offered[first].text} it would be " in str(refused.value)
        named.add(offered[first].text)
    assert len(named) > 3
    assert any("micro_batch" in text for text in named)


def test_the_refusal_says_what_is_needed_and_where_it_goes(config: Config) -> None:
    with pytest.raises(ConfigError) as refused:
        verdict(config, Grid(), room_of(1000))
    first, *ledger = str(refused.value).split("\n")
    sizes = held_bytes(config, Grid())
    largest = max(sizes, key=lambda name: sizes[name])
    assert f"would hold {total(config, Grid()) / 2**20:,.1f} MiB" in first
    assert f"most of it is {largest}, {sizes[largest] / 2**20:,.1f} MiB" in first
    assert "choose a smaller model" in first
    assert ledger == ledger_lines(sizes)
    assert refused.value.exit_code == EXIT_CONFIG


def test_more_ranks_are_offered_where_nothing_else_helps(config: Config) -> None:
    assert cheapest(config, Grid(), Device("cuda"), lambda held: False) is None
    alone = [total(c.config, c.grid) for c in changes(config, Grid()) if c.grid == Grid()]
    found = cheapest(config, Grid(), Device(), lambda held: held < min(alone))
    assert found is not None
    change, held = found
    assert change.grid.size > 1
    assert held == total(change.config, change.grid) < min(alone)


def test_ranks_of_one_machine_share_its_memory(make_config: MakeConfig) -> None:
    """Two pipeline stages of different size; the sum of both counts, not twice the larger."""
    config = make_config({"parallel.pipeline": 2, "model.layers": 3})
    grid = make_grid(config, 2)
    both = needed(config, grid, room_of(1, ranks=2))
    assert total(config, grid) < both < 2 * total(config, grid)
    assert verdict(config, grid, room_of(both, ranks=2)).startswith("it fits: the 2 ranks")
    with pytest.raises(ConfigError, match="2 ranks of this machine"):
        verdict(config, grid, room_of(both // 2, ranks=2))


def linux(folder: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A /proc with 1000 KiB available, and control groups."""
    (folder / "proc/self").mkdir(parents=True)
    text = "MemTotal: 2000 kB\nMemAvailable: 1000 kB\nSwapFree: 24 kB\n"
    (folder / "proc/meminfo").write_text(text)
    (folder / "proc/self/cgroup").write_text(own)
    for name, value in files.items():
        path = folder / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value)
    return folder / "proc", folder / "groups"


@pytest.mark.parametrize(
    "own, files, free",
    [
        ("0::/\n", {}, 1024 * 1024),
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/b/memory.current": "5"}, 1024 * 1024),
        (
            "0::/a/b\n",
            {
                "a/b/memory.max": "max",
                "a/memory.max": "90000",
                "a/memory.current": "50000",
                "a/memory.stat": "anon 1\ninactive_file 7000\nactive_file 500\n",
            },
            47_500,
        ),
        (
            "7:cpu:/x\n4:memory:/x\n0::/\n",
            {
                "memory/x/memory.limit_in_bytes": "80000",
                "memory/x/memory.usage_in_bytes": "20000",
                "memory/x/memory.stat": "total_inactive_file 1000\ntotal_active_file 2000\n",
            },
            63_000,
        ),
    ],
)
def test_free_memory_is_the_machine_s_or_the_control_group_s(
    tmp_path: Path, own: str, files: dict[str, str], free: int
) -> None:
    assert free_memory(*linux(tmp_path, own, files)) == free


def test_where_there_is_no_linux_nothing_is_said(tmp_path: Path) -> None:
    assert free_memory(tmp_path, tmp_path) is None


def test_here_it_is_some_of_the_machine_s(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_memory()
    if sys.platform == "linux":
        assert free is not None
        assert 0 < free < 1 << 50
    monkeypatch.setattr(memory, "free_memory", lambda: None)
    assert memory.find_room(CPU, ALONE) is None
    assert refuse_too_large(config, ALONE) == ""


def test_training_is_refused_before_anything_is_built(
    config_file: ConfigFile, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 100_000)
    monkeypatch.setattr("megallama.train.job.build_trainer", None)
    path = str(config_file())
    assert main(["train", path]) == EXIT_CONFIG
    refused = capsys.readouterr().err
    assert refused.startswith("megallama: error: the run would hold ")
    assert main(["train", path, "--dry-run"]) == EXIT_CONFIG
    shown = capsys.readouterr()
    assert shown.err == refused
    assert "\nsum: " in shown.out


def run_out(_: TrainStep, *arguments: Any, **named: Any) -> None:
    """A step whose allocator has nothing left; it really asks for a petabyte."""
    torch.empty(1 << 50, dtype=torch.uint8)


def raising(error: BaseException) -> Any:
    def run(*arguments: Any, **named: Any) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    "run, asked",
    [
        (run_out, ""),
        (raising(MemoryError()), ""),
        (
            raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU")),
            " for 2.00 GiB more",
        ),
    ],
    ids=["allocator", "MemoryError", "CUDA"],
)
def test_running_out_of_memory_says_what_to_change(
    config_file: ConfigFile,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    run: Any,
    asked: str,
) -> None:
    monkeypatch.setattr(TrainStep, "run", run)
    assert main(["train", str(config_file())]) == EXIT_CONFIG
    first, *ledger = capsys.readouterr().err.splitlines()
    assert f"rank 0: cpu has no memory left{asked}" in first
    assert re.search(r"by the ledger the run holds [\d.]+ MiB; most of it is ", first)
    assert re.search(r"; with \S+=\S+ it would be ", first)
    assert ledger[-1].startswith("sum: ")


def test_other_errors_stay_what_they_are(config: Config) -> None:
    with pytest.raises(RuntimeError, match="shapes"), explained_shortage(config, ALONE):
        raise RuntimeError("shapes cannot be multiplied")


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS bounds the memory on Linux alone")
def test_a_process_that_may_not_grow_ends_with_78(config_file: ConfigFile) -> None:
    """The address space ends 48 MiB above what the imports took; the model needs more."""
    text = """
        import resource, sys
        from pathlib import Path
        import megallama.train.job, megallama.train.launch
        from megallama.cli.main import main
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (48 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        sys.exit(main(sys.argv[1:]))
    """
    path = config_file({"model.vocab": 100_000})
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), "train", str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={"OMP_NUM_THREADS": "1"},
        cwd=Path(memory.__file__).parents[2],
        check=False,
    )
    assert ended.returncode == EXIT_CONFIG, ended.stderr
    assert "rank 0: cpu has no memory left" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_every_rank_of_a_node_is_counted() -> None:
    """Ranks 8 to 11 of 16, of which this is the third."""
    room = memory.find_room(CPU, Process(10, 16, 2, 4, None, None))
    assert room is None or room.ranks == (8, 9, 10, 11)
