"""Secrets of the environment stay there: a whole run, its reports, conversions and failures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ConfigFile

ROOT = Path(__file__).parents[2]
CANARIES = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_CANARY4a1d",
    "AWS_SECRET_ACCESS_KEY": "aws-CANARY-5e2c",
    "MY_DATABASE_URL": "postgres://me:CANARY-9b0e@host/db",
}
#: One process for all commands: importing torch takes longer than they do.
COMMANDS = """
import sys
from megallama.cli.main import main
config, run, out = sys.argv[1:]
codes = [main(words) for words in (
    ["train", config],
    ["report", run],
    ["checkpoint", "ls", run],
    ["checkpoint", "verify", run, "--json", out + "/verify.json"],
    ["convert", "to-hf", run, out + "/hf"],
    ["convert", "to-meta", run, out + "/meta"],
    ["generate", run, "--prompt", "the", "--tokens", "3"],
    ["doctor"],
    ["train", config, "optimizer.lr=1"],
    ["train", config, "nothing.here=1"],
    ["checkpoint", "verify", out + "/hf"],
)]
print(codes)
"""


def holding(folder: Path, secret: bytes) -> list[Path]:
    """The files under a folder with these bytes in them or in their names."""
    found = [path for path in folder.rglob("*") if secret.decode() in path.name]
    return found + [p for p in folder.rglob("*") if p.is_file() and secret in p.read_bytes()]


@pytest.mark.parametrize("wandb", ["off", "offline"])
def test_secrets_of_the_environment_are_written_nowhere(
    config_file: ConfigFile, tmp_path: Path, wandb: str
) -> None:
    if wandb == "offline":
        pytest.importorskip("wandb")
    run, out, repository = tmp_path / "runs" / "tiny", tmp_path / "out", tmp_path / "repository"
    out.mkdir()
    repository.mkdir()
    remote = "https://me:CANARY-git-1c7f@host/repository"
    for words in (["init", "-q"], ["remote", "add", "origin", remote]):
        subprocess.run(["git", *words], cwd=repository, check=True)
    config = config_file({"log.wandb": wandb, "train.steps": 3})
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, str(config), str(run), str(out)],
        capture_output=True,
        text=True,
        cwd=repository,
        env={**os.environ, **CANARIES, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 0, 0, 0, 0, 0, 78, 78, 78]", done.stderr
    assert "warning: the tracker" not in done.stdout + done.stderr
    if wandb == "offline":
        assert list(run.glob("wandb/offline-run-*/*.wandb"))
    for secret in (*CANARIES.values(), "CANARY"):
        assert secret not in done.stdout + done.stderr
        assert holding(run, secret.encode()) == []
        assert holding(out, secret.encode()) == []
