"""The batch script of a run, from the template job.sh."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from megallama.config.schema import Config
from megallama.errors import ConfigError

#: D-HH:MM:SS with what SLURM lets one leave out.
TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d\d?(:\d\d(:\d\d)?)?")
#: Seconds before the time limit at which SLURM signals the script: job.sh's --signal.
ASKED = 600
#: What SLURM takes for the name of an account or of partitions, on one line.
WORD = re.compile(r"[A-Za-z0-9_.,@+-]+")


@dataclass(frozen=True)
class Options:
    """What the command line of `launch slurm` says beside the config.

    `gpus_per_node`: 0 for a CPU partition, where a node has one rank.
    """

    nodes: int
    gpus_per_node: int = 8
    time: str = "24:00:00"
    partition: str = ""
    account: str = ""
    spares: int = 0
    one_task_per_node: bool = False

    def __post_init__(self) -> None:
        least = {"nodes": (self.nodes, 1), "gpus-per-node": (self.gpus_per_node, 0)}
        for name, (value, lowest) in {**least, "spares": (self.spares, 0)}.items():
            if value < lowest:
                raise ConfigError(f"--{name} {value}: at least {lowest} is needed")
        if not TIME.fullmatch(self.time):
            raise ConfigError(f"--time {self.time}: is no time of SLURM's; write D-HH:MM:SS")
        if 0 < _seconds(self.time) <= ASKED:
            raise ConfigError(
                f"--time {self.time}: ranks are asked to save {ASKED // 60} minutes before the "
                f"limit; give at least {ASKED // 60 + 5}"
            )
        for name, word in {"partition": self.partition, "account": self.account}.items():
            if word and not WORD.fullmatch(word):
                raise ConfigError(f"--{name} {word!r}: is no name; write letters and digits")

    @property
    def ranks_per_node(self) -> int:
        return max(1, self.gpus_per_node)

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def tasks_per_node(self) -> int:
        return 1 if self.one_task_per_node else self.ranks_per_node


def render(config: Config, options: Options, train: Sequence[str], command: Sequence[str]) -> str:
    """The script that runs `megallama train` with the words `train`; `command` made it."""
    template = files("megallama.train.slurm").joinpath("job.sh").read_text()
    values = {
        "title": _title(config, options),
        "command": shlex.join(command),
        "directives": "\n".join(f"#SBATCH --{line}" for line in _directives(config, options)),
        "config": shlex.join(train),
        "directory": shlex.quote(str(config.run.directory)),
        "gpus": options.gpus_per_node,
        "nodes": options.nodes,
        "tasks": options.nodes * options.tasks_per_node,
        "tasks_per_node": options.tasks_per_node,
        "ranks_per_node": options.ranks_per_node,
        "nproc": f" --nproc {options.ranks_per_node}" if options.one_task_per_node else "",
    }
    return re.sub(r"@([a-z_]+)@", lambda found: str(values[found[1]]), template)


def _seconds(time: str) -> int:
    """Of M, M:SS, H:MM:SS, D-H, D-H:MM or D-H:MM:SS. 0 is SLURM's word for no limit."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash or len(parts) == 3:  # from the hours on
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:  # from the minutes on
        hours, minutes, seconds = [0, *parts, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def script_path(directory: Path) -> Path:
    """Where a script goes that is submitted at once."""
    return directory / "slurm" / "job.sbatch"


def _title(config: Config, options: Options) -> str:
    words = f"{config.run.name}: {options.ranks} ranks on {options.nodes} nodes"
    return f"{words}, {options.spares} to spare" if options.spares else words


def _directives(config: Config, options: Options) -> list[str]:
    lines = [
        f"job-name={config.run.name}",
        f"nodes={options.nodes + options.spares}",
        f"ntasks-per-node={options.tasks_per_node}",
    ]
    if options.gpus_per_node:
        lines.append(f"gpus-per-node={options.gpus_per_node}")
    lines += ["exclusive", "mem=0", f"time={options.time}"]
    lines += [f"partition={options.partition}"] if options.partition else []
    lines += [f"account={options.account}"] if options.account else []
    return [*lines, "output=%x-%j.log", "open-mode=append"]
