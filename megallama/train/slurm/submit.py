"""Hands a batch script to sbatch."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from megallama.errors import ConfigError, LostError

#: What sbatch says where the controller is away for now.
AWAY = re.compile("Unable to contact|timed out|Connection refused|Communication connection")


def submit(script: Path) -> str:
    """The id of the job.

    Raises:
        ConfigError: sbatch is not here, or refuses.
        LostError: SLURM's controller does not answer.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise ConfigError(
            f"--submit: sbatch cannot be run ({error.strerror}); where it is, run sbatch {script}"
        ) from None
    if done.returncode == 0:
        return done.stdout.strip().partition(";")[0]
    said = [re.sub(r"^sbatch: (error: )?", "", line) for line in done.stderr.splitlines()]
    reason = "; ".join(line.strip() for line in said if line.strip())
    kind = LostError if AWAY.search(reason) else ConfigError
    raise kind(f"sbatch refused {script}: {reason or f'exit code {done.returncode}'}")
