"""The batch script, with stand-ins for SLURM's commands, megallama and sleep."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megallama.cli.main import main
from tests.conftest import ConfigFile

LIMIT = 120.0

#: Every command notes its words. SLURM's controller fails the first $AWAY requests.
STAND_IN = r"""#!/bin/bash
name=$(basename "$0")
echo "$name $*" >>"$NOTES/calls"
ask() { # the controller
    echo >>"$NOTES/asked"
    (($(wc -l <"$NOTES/asked") > AWAY)) || { echo "$name: no controller" >&2; exit 1; }
}
case "$name $*" in
"scontrol show hostnames "*) tr , '\n' <<<"$3" ;;
"scontrol show job "*) ask; echo "JobId=7 ExcNodeList=n9 NodeList=n1" ;;
"scontrol show node "*) ask; echo "NodeName=n1 NodeAddr=10.0.0.1 x" ;;
"scontrol "*) ask ;;
"squeue "*-s*)
    ask
    echo 7.batch
    [ "$(grep -c ' -s ' "$NOTES/calls")" -gt "$STEPS" ] || printf '7.%s\n' 0 1
    ;;
"squeue "*%N*) ask; echo n1,n2 ;;
"megallama launch usable "*) echo "$5" ;;
"srun "*) echo "$MASTER_ADDR" >>"$NOTES/addresses" ;;
"megallama launch choose "* | "megallama launch after "*)
    number=$(grep -c '^megallama launch [ca][hf]' "$NOTES/calls")
    sed -n "${number}p" "$NOTES/actions"
    ;;
esac
"""


class Script:
    """A rendered script, and what it called."""

    def __init__(self, folder: Path, config: Path) -> None:
        self.folder, self.path, programs = folder, folder / "job.sbatch", folder / "programs"
        words = ["launch", "slurm", str(config), "--nodes", "2", "--gpus-per-node", "0"]
        assert main([*words, "--out", str(self.path)]) == 0
        programs.mkdir()
        for name in ("scontrol", "squeue", "scancel", "srun", "sleep", "megallama"):
            (programs / name).write_text(STAND_IN)
            (programs / name).chmod(0o755)
        self.environ = {"PATH": f"{programs}:{os.environ['PATH']}", "NOTES": str(folder)}
        self.environ |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1,n2,n3"}

    def run(self, *actions: str, away: int = 0, steps: int = 0) -> tuple[int, str]:
        """Its code and errors, where `actions` are decided in turn, the controller does not answer
        the first `away` requests, and the first `steps` looks find steps of the job."""
        (self.folder / "actions").write_text("\n".join(actions) + "\n")
        done = subprocess.run(
            ["bash", self.path],
            env=self.environ | {"AWAY": str(away), "STEPS": str(steps)},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        return done.returncode, done.stderr

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def script(tmp_path: Path, config_file: ConfigFile) -> Script:
    (tmp_path / "job").mkdir()
    return Script(tmp_path / "job", config_file())


def test_a_requeue_outlasts_a_controller_that_is_away(script: Script) -> None:
    """And what the user excludes stays excluded."""
    code, error = script.run("requeue n2", away=8)
    assert (code, error.count("cannot be requeued")) == (75, 0)
    assert script.calls[-2:] == [
        "scontrol requeue 7",
        "scontrol update JobId=7 ExcNodeList=n9,n2",
    ]
    assert "sleep 20" in script.calls


def test_a_requeue_that_cannot_be_is_told_with_the_way_out(script: Script) -> None:
    code, error = script.run("requeue", away=1000)
    assert code == 75
    assert error.splitlines()[-1] == "job: cannot be requeued; scontrol requeue 7"


def test_nodes_meet_at_the_first_one_before_a_run_and_in_it(script: Script) -> None:
    assert script.run("train n1,n2", "stop 0")[0] == 0
    steps = [call for call in script.calls if call.startswith("srun ")]
    assert ["launch health" in call for call in steps] == [True, False]
    assert (script.folder / "addresses").read_text().split() == ["10.0.0.1"] * 2


def test_without_an_answer_the_allocation_is_that_of_the_start(script: Script) -> None:
    assert script.run("stop 3", away=1000)[0] == 3
    asked = [call for call in script.calls if "--allocated" in call]
    assert len(asked) == 2
    assert all("--allocated n1,n2,n3" in call for call in asked)


@pytest.mark.parametrize("looks, waits", [(3, 2), (1000, 30)])
def test_another_attempt_waits_for_the_end_of_the_last_one(
    looks: int, waits: int, script: Script
) -> None:
    assert script.run("relaunch", "stop 0", steps=looks)[0] == 0
    killed = script.calls.index("scancel --signal=KILL 7.0 7.1")
    begun = next(i for i, call in enumerate(script.calls) if "/7.0.2 " in call)
    assert killed < begun
    assert script.calls[killed:begun].count("sleep 2") == waits
