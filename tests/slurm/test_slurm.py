"""Rendered scripts on a real SLURM: requeued, out of time, robbed of a node, cancelled."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from megallama.train.process import expand_nodes
from tests.conftest import LENGTH, VOCAB, TinyData, losses
from tests.slurm.cluster import LIMIT, Cluster, wait_for, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

ROOT = Path(__file__).parents[2]
STEPS = 9
GATED = f"{sys.executable} -m tests.slurm.gated"


class Bench:
    """A cluster, and a folder from which runs are submitted."""

    def __init__(self, cluster: Cluster, folder: Path, data: TinyData) -> None:
        self.cluster, self.folder, self.data = cluster, folder, data
        self.environ = {
            "MEGALLAMA": GATED,
            "PYTHONPATH": str(ROOT),
            "GLOO_SOCKET_IFNAME": "lo",  # the machine's name may have no address
            "OMP_NUM_THREADS": "1",
        }

    def config(self, name: str, **parallel: int) -> Path:
        """The config of a run of this name, written."""
        config = {
            "run": {"name": name},
            "model": {"d_model": 16, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 24,
                      "vocab": VOCAB},
            "train": {"steps": STEPS, "sequence_length": LENGTH, "global_batch": 4,
                      "precision": "fp32"},
            "parallel": parallel,
            "optimizer": {"lr": 0.01, "warmup_steps": 2},
            "data": {
                "tokenizer": str(self.data.tokenizer),
                "mixture": [{"name": n, "path": str(p), "weight": 1}
                            for n, p in self.data.prefixes.items()],
            },
            "checkpoint": {"every": 5},
        }  # fmt: skip
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    def submit(self, config: Path, *words: str, gates: str = "") -> str:
        """The id of the job; it waits at the steps `gates`."""
        (self.folder / config.stem).mkdir()
        words = (config.name, *words, "--gpus-per-node", "0", "--time", "30", "--submit")
        return self.launch(config.stem, gates, *words).split()[1].rstrip(",")

    def submit_pairs(self, config: Path, *words: str, gates: str = "") -> str:
        """The same with `train --nproc 2` on each node. SLURM knows of no GPUs here."""
        (self.folder / config.stem).mkdir()
        words = (config.name, *words, "--gpus-per-node", "2", "--one-task-per-node")
        script = self.launch(config.stem, gates, *words, "--time", "30")
        script = script.replace("#SBATCH --gpus-per-node=2\n", "").replace("--gpus 2", "--gpus 0")
        path = self.folder / f"{config.stem}.sbatch"
        path.write_text(script)
        return self.command(config.stem, gates, "sbatch", "--parsable", path.name).strip()

    def launch(self, name: str, gates: str, *words: str) -> str:
        return self.command(name, gates, *GATED.split(), "launch", "slurm", *words)

    def command(self, name: str, gates: str, *words: str) -> str:
        """What a command prints that may submit the job `name`."""
        variables = {"GATES": gates, "GATE_DIR": str(self.folder / name)}
        done = subprocess.run(
            words,
            env=self.cluster.environ | self.environ | variables,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        if done.returncode:  # without what pytest would add to the text, which a test counts in
            raise AssertionError(done.stderr)
        return done.stdout

    def reaches(self, name: str, step: int) -> None:
        wait_for(f"{name} at step {step}", (self.folder / name / f"reached-{step}").exists)

    def state(self, job: str, *states: str) -> dict[str, str]:
        """What SLURM knows of a job once it is in one of these states, or in a last one."""
        ends = {*states, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}
        wait_for(f"job {job} {states}", lambda: self.cluster.job(job)["JobState"] in ends)
        return self.cluster.job(job)

    def hurry(self, job: str) -> None:
        """Once the job is back in the queue, start it, with time enough: SLURM waits 2 minutes."""
        assert self.state(job, "PENDING")["JobState"] == "PENDING"
        self.cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now", "TimeLimit=30")

    def undisturbed(self, config: Path, ranks: int) -> subprocess.Popen[str]:
        """Starts the same run, as NAME-local, in local workers without SLURM."""
        words = [config.name, "--nproc", str(ranks), f"run.name={config.stem}-local"]
        return subprocess.Popen(
            [*GATED.split(), "train", *words],
            env=self.cluster.environ | self.environ,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def losses(self, name: str) -> list[tuple[object, ...]]:
        return losses(self.folder / "runs" / name)

    def log(self, name: str, job: str) -> str:
        return (self.folder / f"{name}-{job}.log").read_text()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_data: TinyData) -> Iterator[Bench]:
    with Cluster(four=5, two=2) as cluster:
        yield Bench(cluster, tmp_path_factory.mktemp("slurm"), tiny_data)


def test_a_job_outlives_a_requeue_a_lost_node_and_the_time_limit(bench: Bench) -> None:
    """Two jobs at once. A task a rank: requeued, and then robbed of a node. A task a node: asked to
    save by the time limit, and then cancelled."""
    wide, narrow = bench.config("wide", tensor=2), bench.config("narrow")
    words = ["--partition", "four", "--nodes", "4", "--spares", "1"]
    first = bench.submit(wide, *words, gates="2,7")
    second = bench.submit_pairs(narrow, "--partition", "two", "--nodes", "2", gates="2,4")

    bench.reaches("narrow", 2)
    # Less than the ten minutes before which SLURM is to warn: it does so at once. One minute would
    # be over on a slow machine, and the job with it.
    bench.cluster.run("scontrol", "update", f"JobId={second}", "TimeLimit=9")
    bench.reaches("wide", 2)
    bench.cluster.run("scontrol", "requeue", first)
    local = [bench.undisturbed(wide, 4), bench.undisturbed(narrow, 4)]
    bench.hurry(first)

    bench.reaches("wide", 7)  # the newest checkpoint is that of step 5
    bench.cluster.lose("n2")
    (bench.folder / "wide" / "open-7").touch()
    survivors = bench.folder / "runs/wide/slurm" / f"{first}.1.1/ended"
    wait_for("the survivors' end", lambda: len(list(survivors.iterdir())) == 3)
    bench.cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=lost")
    bench.hurry(second)
    bench.reaches("narrow", 4)
    bench.cluster.run("scancel", second)

    ended = bench.state(first)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), bench.log("wide", first)
    assert "attempt 2 on n1,n3,n4,n5" in bench.log("wide", first)
    history = bench.folder / f"runs/wide/slurm/history/{first}.json"
    assert json.loads(history.read_text())["failures"] == {"n2": 1}
    ended = bench.state(second)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "1")
    wait_for("the end of its script", lambda: second not in bench.cluster.run("squeue", "-h"))
    assert bench.cluster.job(second)["JobState"] == "CANCELLED"

    for process in local:
        _, error = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, error
    assert len(bench.losses("wide")) == STEPS
    assert bench.losses("wide") == bench.losses("wide-local")
    rows = bench.losses("narrow")
    assert len(rows) >= 4
    assert rows == bench.losses("narrow-local")[: len(rows)]


def test_codes_and_refusals_reach_the_user(bench: Bench) -> None:
    """Corrupt data end a job with 65, and it stays ended; a partition that is not there is refused
    in one line."""
    config = bench.config("corrupt")
    data = bench.folder / "data"
    data.mkdir()
    for path in bench.data.prefixes["code"].parent.glob("code.*"):
        (data / path.name).write_bytes(path.read_bytes())
    tokens = bytearray((data / "code.bin").read_bytes())
    tokens[5] ^= 1
    (data / "code.bin").write_bytes(tokens)
    mixture = f"data.mixture=[{{name: code, path: {data / 'code'}, weight: 1}}]"
    job = bench.submit(config, mixture, "--partition", "two", "--nodes", "2")
    ended = bench.state(job)
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "65:0"), bench.log("corrupt", job)
    assert "code.bin" in bench.log("corrupt", job), "the error is in the job's log"

    with pytest.raises(AssertionError, match="invalid partition") as refused:
        bench.submit(bench.config("refused"), "--partition", "nowhere", "--nodes", "2")
    assert str(refused.value).count("megallama: error: sbatch refused") == 1


STUB = """#!/bin/sh
case "$2" in
usable) echo "$5" ;;
choose) echo "requeue n7" ;;
esac
"""


def test_a_requeued_job_leaves_out_bad_nodes_and_those_it_left_out_before(bench: Bench) -> None:
    """With a stand-in for megallama that finds n7 bad."""
    config = bench.config("excluding")
    words = ("--partition", "two", "--nodes", "1", "--gpus-per-node", "0", "--time", "30")
    (bench.folder / "excluding.sbatch").write_text(
        bench.launch("excluding", "", config.name, *words)
    )
    stub = bench.folder / "stub"
    stub.write_text(STUB)
    stub.chmod(0o755)
    submit = ["env", f"MEGALLAMA={stub}", "sbatch", "--parsable", "--exclude=n6"]
    job = bench.command("excluding", "", *submit, "excluding.sbatch").strip()

    def left_out() -> list[str]:
        return expand_nodes(bench.cluster.job(job)["ExcNodeList"])

    wait_for("the exclusion", lambda: left_out() == ["n6", "n7"])
    assert bench.cluster.job(job)["Restarts"] == "1"
    bench.cluster.run("scancel", job)
