"""What a launcher's environment says, from plain dictionaries."""

from __future__ import annotations

import pytest

from megallama.errors import ConfigError
from megallama.train.launch import launch
from megallama.train.process import (
    ALONE,
    Place,
    Process,
    connect,
    expand_counts,
    expand_nodes,
    find_place,
)
from megallama.train.signals import StopSignals

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_NTASKS": "12",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8,4",
    "SLURM_STEP_NODELIST": "node[003-004]",
}


def test_no_launcher() -> None:
    assert find_place({"HOME": "/root", "WORLD_SIZE": "1"}) is None


def test_torchrun() -> None:
    assert find_place(TORCHRUN) == Place(5, 8, 1, 4, "10.0.0.1", 29500, hosted=False)
    assert find_place({**SRUN, **TORCHRUN}) == find_place(TORCHRUN), "torchrun started by srun"


def test_srun() -> None:
    place = find_place(SRUN)
    assert place is not None
    assert place == Place(9, 12, 1, 4, "node003", place.port, hosted=True)
    assert 20000 <= place.port < 32000


def test_srun_s_port_differs_between_steps_and_may_be_chosen() -> None:
    ports = [find_place({**SRUN, "SLURM_STEP_ID": str(step)}) for step in range(4)]
    assert len({place.port for place in ports if place}) == 4
    chosen = find_place({**SRUN, "MASTER_ADDR": "ib0", "MASTER_PORT": "7"})
    assert chosen is not None
    assert (chosen.host, chosen.port) == ("ib0", 7)


def test_srun_s_older_variables() -> None:
    newer = ("SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST")
    environ = {k: v for k, v in SRUN.items() if k not in newer}
    environ |= {"SLURM_NTASKS_PER_NODE": "6", "SLURM_JOB_NODELIST": "a,b"}
    place = find_place(environ)
    assert place is not None
    assert (place.local_size, place.host) == (6, "a")


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_STEP_ID": None},  # sbatch's script and salloc's shell
        {"SLURM_STEP_ID": "4294967290"},  # salloc's shell on a node
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun --pty bash
    ],
)
def test_not_started_by_srun(changes: dict[str, str | None]) -> None:
    environ = {name: value for name, value in {**SRUN, **changes}.items() if value is not None}
    assert find_place(environ) is None


@pytest.mark.parametrize(
    "environ, name, value",
    [
        (TORCHRUN, "RANK", "x"),
        (TORCHRUN, "RANK", "8"),
        (TORCHRUN, "RANK", "-1"),
        (TORCHRUN, "WORLD_SIZE", "0"),
        (TORCHRUN, "LOCAL_RANK", "4"),
        (TORCHRUN, "LOCAL_WORLD_SIZE", "9"),
        (TORCHRUN, "MASTER_PORT", "65536"),
        (SRUN, "SLURM_PROCID", "12"),
        (SRUN, "SLURM_LOCALID", "4"),
        (SRUN, "SLURM_NODEID", "2"),
        (SRUN, "SLURM_STEP_TASKS_PER_NODE", "8(x"),
        (SRUN, "SLURM_STEP_NODELIST", "node[3-"),
        (SRUN, "SLURM_JOB_ID", "j"),
    ],
)
def test_a_malformed_variable(environ: dict[str, str], name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name}={value.translate(ESCAPES)}: .*unset"):
        find_place({**environ, name: value})


ESCAPES = str.maketrans({letter: f"\\{letter}" for letter in "()["})


@pytest.mark.parametrize("name", [name for name in TORCHRUN if name != "RANK"])
def test_a_missing_variable(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} is not set"):
        find_place({k: v for k, v in TORCHRUN.items() if k != name})


@pytest.mark.parametrize(
    "text, nodes",
    [
        ("localhost", "localhost"),
        ("a,b-1", "a b-1"),
        ("node[003-005,12],other7", "node003 node004 node005 node12 other7"),
        ("n[08-10]", "n08 n09 n10"),
        ("n[9-11]-ib", "n9-ib n10-ib n11-ib"),
        ("r[1-2]n[7,9]", "r1n7 r1n9 r2n7 r2n9"),
    ],
)
def test_node_lists(text: str, nodes: str) -> None:
    assert expand_nodes(text) == nodes.split()


@pytest.mark.parametrize("text", ["", "a,", "a[1", "a]1[", "a[1-]", "a[2-1]", "a[[1]]", "a[x]"])
def test_malformed_node_lists(text: str) -> None:
    with pytest.raises(ValueError):
        expand_nodes(text)


def test_tasks_per_node() -> None:
    assert expand_counts("8") == [8]
    assert expand_counts("8(x2),4") == [8, 8, 4]
    for text in ("", "8(2)", "8(x2", "x"):
        with pytest.raises(ValueError):
            expand_counts(text)


def test_a_launched_process_alone_needs_no_store() -> None:
    assert connect(Place(0, 1, 0, 1, "nowhere", 1, hosted=False)) is ALONE


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_one_process_does_the_work_itself(launcher: pytest.MonkeyPatch) -> None:
    def work(prepared: int, process: Process, stop: StopSignals) -> int:
        return 75 if process is ALONE and prepared == 1 else 1

    assert launch(1, lambda size: size, work) == 75


@pytest.mark.parametrize("nproc, launched", [(0, False), (-1, False), (2, True)])
def test_nproc_is_refused(launcher: pytest.MonkeyPatch, nproc: int, launched: bool) -> None:
    for name, value in TORCHRUN.items() if launched else ():
        launcher.setenv(name, value)
        launcher.setenv("LOCAL_RANK", "0")  # the others of a machine return the code in silence
    with pytest.raises(ConfigError, match=f"^--nproc {nproc}: "):
        launch(nproc, lambda size: size, lambda size, process, stop: 0)
