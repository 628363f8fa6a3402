"""`megallama launch slurm`: the script, bad input, sbatch's refusals; and what the script calls."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from megallama.cli.main import main
from megallama.errors import ConfigError
from megallama.train.slurm import history
from megallama.train.slurm.render import ASKED, Options
from tests.conftest import ConfigFile

Captured = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[3]
SCRIPTS = sorted((ROOT / "launch").glob("*.sbatch"))


def launch(*words: object) -> int:
    return main(["launch", *map(str, words)])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_ready_script_is_what_its_command_makes(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    command = shlex.split(script.read_text().splitlines()[2].lstrip("#"))
    assert main([*command[1:], "--out", str(tmp_path / "made")]) == 0
    assert (tmp_path / "made").read_text() == script.read_text()


def test_every_preset_has_a_script() -> None:
    presets = {path.stem for path in (ROOT / "configs").glob("llama*.yaml")}
    assert {path.stem for path in SCRIPTS} == presets


def rendered(capsys: Captured, *words: object) -> str:
    assert launch("slurm", *words) == 0
    script = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    return script


def test_options_reach_the_script(config_file: ConfigFile, capsys: Captured) -> None:
    words = [config_file(), "run.name=it", "train.micro_batch=1", "--nodes", 2, "--spares", 1]
    words += [
        "--gpus-per-node",
        2,
        "--time",
        "1-00:00:00",
        "--partition",
        "a100",
        "--account",
        "lab",
    ]
    script = rendered(capsys, *words)
    lines = script.splitlines()
    wanted = "nodes=3 ntasks-per-node=2 gpus-per-node=2 time=1-00:00:00 partition=a100"
    for option in f"{wanted} account=lab job-name=it signal=B:USR1@600".split():
        assert f"#SBATCH --{option}" in lines
    assert "--nodes=2 --ntasks=4 --ntasks-per-node=2" in script
    assert "--nproc" not in script
    assert not re.search(r"@[a-z_]+@", script)


def test_one_task_a_node(config_file: ConfigFile, capsys: Captured) -> None:
    words = [config_file({"train.micro_batch": 1}), "--nodes", 2, "--gpus-per-node", 2]
    words.append("--one-task-per-node")
    script = rendered(capsys, *words)
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1" in script
    assert 'train "${config[@]}" --nproc 2\n' in script
    assert "--ranks-per-node 2" in script


def test_a_cpu_partition_has_one_rank_a_node(config_file: ConfigFile, capsys: Captured) -> None:
    script = rendered(capsys, config_file(), "--nodes", 2, "--gpus-per-node", 0)
    assert "gpus-per-node=" not in script
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1" in script


def test_odd_words_stay_one_word_each(config_file: ConfigFile, capsys: Captured) -> None:
    """No name of a run or path becomes a command of the script."""
    override = "run.root=$(touch owned) `x` 'y'; z"
    script = rendered(capsys, config_file(), override, "--nodes", 2, "--gpus-per-node", 0)
    array = next(line for line in script.splitlines() if line.startswith("config="))
    shown = subprocess.run(
        ["bash", "-c", f'{array}; printf "%s\\n" "${{config[@]}}"'], capture_output=True, text=True
    )
    assert shown.stdout.splitlines()[1] == override
    work = next(line for line in script.splitlines() if line.startswith("work="))
    shown = subprocess.run(["bash", "-c", f'{work}; echo "$work"'], capture_output=True, text=True)
    assert shown.stdout == "$(touch owned) `x` 'y'; z/tiny/slurm\n"


BAD = {
    "nodes": (["--nodes", 3], "--nodes 3 of 8 ranks: "),
    "no nodes": (["--nodes", 0], "--nodes 0: at least 1"),
    "spares": (["--nodes", 1, "--spares", -1], "--spares -1: at least 0"),
    "time": (["--nodes", 1, "--time", "soon"], "--time soon: "),
    "partition": (["--nodes", 1, "--partition", "a\n#SBATCH"], "--partition 'a\\n#SBATCH'"),
    "config": (["--nodes", 1, "train.steps=0"], "train.steps=0"),
    "key": (["--nodes", 1, "train.stesp=3"], "train.stesp"),
    "no such option": (["--nodes", 1, "--cores", 3], "--cores 3"),
}


@pytest.mark.parametrize(
    "time, fits",
    [(time, False) for time in ("10", "10:00", "0:10:00", "0-0:10")]
    + [(time, True) for time in ("15", "10:01", "00:10:01", "0-0:11", "0-1", "1-00:00:00", "0")],
)
def test_a_time_limit_leaves_time_to_train(time: str, fits: bool) -> None:
    if fits:
        Options(nodes=1, time=time)
    else:
        with pytest.raises(ConfigError, match="before the limit; give at least 15"):
            Options(nodes=1, time=time)


def test_the_script_s_signal_is_the_one_that_time_limits_are_checked_against(
    config_file: ConfigFile, capsys: Captured
) -> None:
    script = rendered(capsys, config_file(), "--nodes", 1, "--gpus-per-node", 0)
    assert f"--signal=B:USR1@{ASKED}" in script


@pytest.mark.parametrize("words, part", BAD.values(), ids=BAD)
def test_bad_input_is_one_line(
    words: list[object], part: str, config_file: ConfigFile, capsys: Captured
) -> None:
    assert launch("slurm", config_file(), *words) == 78
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("megallama: error: ")
    assert part in shown.err
    assert shown.err.count("\n") == 1


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a stand-in for sbatch, alone on the path with what bash has."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}")
    return folder


def stand_in(folder: Path, text: str) -> None:
    path = folder / "sbatch"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


REFUSALS = {
    "invalid partition": (
        "sbatch: error: invalid partition specified: gpu\n"
        "sbatch: error: Batch job submission failed: Invalid partition name specified",
        78,
        "invalid partition specified: gpu; Batch job submission failed: Invalid partition",
    ),
    "nothing said": ("", 78, "exit code 1"),
    "away": ("sbatch: error: Unable to contact slurm controller (connect failure)", 69, "Unable"),
}


@pytest.mark.parametrize("said, code, part", REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_is_one_line(
    said: str, code: int, part: str, sbatch: Path, config_file: ConfigFile, capsys: Captured
) -> None:
    stand_in(sbatch, f"echo {shlex.quote(said)} >&2\nexit 1")
    words = ["--nodes", 2, "--gpus-per-node", 0, "--submit", "--partition", "gpu"]
    assert launch("slurm", config_file(), *words) == code
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert part in err


def test_without_sbatch_the_script_is_written(
    sbatch: Path, config_file: ConfigFile, tmp_path: Path, capsys: Captured
) -> None:
    words = ["--nodes", 2, "--gpus-per-node", 0, "--submit"]
    assert launch("slurm", config_file(), *words) == 78
    path = tmp_path / "runs/tiny/slurm/job.sbatch"
    assert f"run sbatch {path}" in capsys.readouterr().err
    assert path.read_text().startswith("#!/usr/bin/env bash")


def test_submitting(
    sbatch: Path, config_file: ConfigFile, tmp_path: Path, capsys: Captured
) -> None:
    stand_in(sbatch, 'echo "17;cluster"')
    out = tmp_path / "mine.sbatch"
    words = ["--nodes", 2, "--gpus-per-node", 0, "--submit", "--out", out]
    assert launch("slurm", config_file(), *words) == 0
    assert capsys.readouterr().out == f"job 17, {out}\n"


def test_what_the_script_calls(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt from its beginning to a lost node, another one, and the end."""
    work = tmp_path / "runs/it/slurm"
    job = ["--allocated", "n1,n2,n3", "--nodes", 2, "--state", "RUNNING"]

    def attempt(number: int) -> Path:
        folder = work / f"7.0.{number}"
        for kind in ("started", "ended", "health"):
            (folder / kind).mkdir(parents=True)
        return folder

    def said(*words: object) -> str:
        assert launch(*words) == 0
        return capsys.readouterr().out.strip()

    first = attempt(1)
    assert said("usable", first, "--allocated", "n1,n2,n3") == "n1,n2,n3"
    for node in ("n1", "n2", "n3"):
        monkeypatch.setenv("SLURMD_NODENAME", node)
        said("health", first, "--gpus", 0)
    assert said("choose", first, *job) == "train n1,n2"
    (first / "started/0").write_text("n1\n")
    (first / "started/1").write_text("n2\n")
    (first / "ended/0").write_text("69 n1\n")
    lost = "rank 1 is lost: rank 0 waited for it to send x (group 'data'); try again"
    (first / "rank-0.log").write_text(f"a step\nmegallama: error: {lost}\n")
    assert said("after", first, *job, "--code", 137, "--ranks-per-node", 1) == "relaunch"
    assert json.loads((work / "history/7.json").read_text())["failures"] == {"n2": 1}

    second = attempt(2)
    assert said("usable", second, "--allocated", "n1,n2,n3") == "n1,n3"
    assert said("after", second, *job, "--code", 0, "--ranks-per-node", 1) == "stop 0"


def test_an_action_is_said_where_the_history_cannot_be_written(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "runs/it/slurm/7.0.1"
    (folder / "health").mkdir(parents=True)

    def refuse(path: Path, content: bytes) -> None:
        raise ConfigError(f"{path}: cannot be written")

    monkeypatch.setattr(history, "write_atomic", refuse)
    job = ["--allocated", "n1", "--nodes", 1, "--state", "RUNNING"]
    assert launch("choose", folder, *job) == 0
    shown = capsys.readouterr()
    assert shown.out == "relaunch\n"
    assert "history/7.json: cannot be written" in shown.err


LOCAL = {
    "two GPUs": ("echo 'GPU 0: A'; echo 'GPU 1: B'", {}, 0, "--nproc 2"),
    "no driver": (None, {}, 0, "--nproc 1"),
    "a number of ranks": (None, {"RANKS": "4"}, 0, "--nproc 4"),
    "broken driver": ("exit 9", {}, 78, ""),
}


@pytest.mark.parametrize("driver, variables, code, nproc", LOCAL.values(), ids=LOCAL)
def test_on_one_machine(
    driver: str | None, variables: dict[str, str], code: int, nproc: str, tmp_path: Path
) -> None:
    programs = {"megallama": 'echo "$@"', "grep": 'exec /bin/grep "$@"'}
    if driver is not None:
        programs["nvidia-smi"] = driver
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", ROOT / "launch/local.sh", "c.yaml", "run.name=a b"],
        env={"PATH": str(tmp_path), **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    wanted = f"train c.yaml run.name=a b {nproc} --restarts 3\n" if nproc else ""
    assert done.stdout == wanted
    assert done.stderr.count("\n") == (1 if code else 0)
