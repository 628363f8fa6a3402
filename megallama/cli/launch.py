"""Make a SLURM job of a run, and submit it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megallama.config.schema import Config
    from megallama.train.slurm.attempt import Attempt
    from megallama.train.slurm.decide import Decision, Job
    from megallama.train.slurm.history import History


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares `launch slurm`, and what its script calls, which the help does not list."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="COMMAND")

    slurm = commands.add_parser("slurm", help="a batch script for a config; --submit submits it")
    slurm.add_argument("config", type=Path, metavar="CONFIG")
    slurm.add_argument("overrides", nargs="*", metavar="section.key=value")
    slurm.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes that train")
    slurm.add_argument(
        "--gpus-per-node",
        type=int,
        default=8,
        metavar="N",
        help="ranks of a node (default 8); 0: one rank a node, without a GPU",
    )
    slurm.add_argument("--time", default="24:00:00", metavar="D-HH:MM:SS", help="time limit")
    slurm.add_argument("--partition", default="", metavar="NAME")
    slurm.add_argument("--account", default="", metavar="NAME")
    slurm.add_argument(
        "--spares", type=int, default=0, metavar="N", help="more nodes, to go on with if some fail"
    )
    slurm.add_argument(
        "--one-task-per-node",
        action="store_true",
        help="`megallama train --nproc` on each node, not a task for each rank",
    )
    slurm.add_argument("--submit", action="store_true", help="submit it with sbatch")
    slurm.add_argument(
        "--out",
        type=Path,
        metavar="F",
        help="write it here; default: print it, or RUN_DIR/slurm/ to submit",
    )

    usable = commands.add_parser("usable")
    health = commands.add_parser("health")
    choose = commands.add_parser("choose")
    after = commands.add_parser("after")
    for command in (usable, health, choose, after):
        command.add_argument("attempt", type=Path)
    health.add_argument("--gpus", type=int, required=True)
    for command in (usable, choose, after):
        command.add_argument("--allocated", required=True)
    for command in (choose, after):
        command.add_argument("--nodes", type=int, required=True)
        command.add_argument("--asked", default="")
        command.add_argument("--state", default="")
    after.add_argument("--code", type=int, required=True)
    after.add_argument("--ranks-per-node", type=int, required=True)


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand. Raises UserError."""
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "slurm": _slurm,
        "usable": _usable,
        "health": _health,
        "choose": _choose,
        "after": _after,
    }
    return actions[args.action](args)


def _slurm(args: argparse.Namespace) -> int:
    from megallama.config.load import load_config
    from megallama.errors import EXIT_DONE, ConfigError
    from megallama.files import write_atomic
    from megallama.spec.grid import make_grid
    from megallama.train.slurm.render import Options, render, script_path

    options = Options(
        args.nodes, args.gpus_per_node, args.time, args.partition, args.account, args.spares,
        args.one_task_per_node,
    )  # fmt: skip
    config: Config = load_config(args.config, args.overrides)
    try:
        make_grid(config, options.ranks)
    except ConfigError as error:
        text = f"--nodes {args.nodes} of {options.ranks_per_node} ranks: {error}"
        raise ConfigError(text) from error
    script = render(config, options, [str(args.config), *args.overrides], _command(args))
    out = args.out or (script_path(config.run.directory) if args.submit else None)
    if out is None:
        print(script, end="")
        return EXIT_DONE
    write_atomic(out, script.encode())
    if args.submit:
        from megallama.train.slurm.submit import submit

        print(f"job {submit(out)}, {out}")
    return EXIT_DONE


def _command(args: argparse.Namespace) -> list[str]:
    """The command line that makes the script again: what is not a default."""
    words = ["megallama", "launch", "slurm", str(args.config), *args.overrides]
    words += ["--nodes", str(args.nodes)]
    defaults = {"gpus_per_node": 8, "time": "24:00:00", "partition": "", "account": "", "spares": 0}
    for name, default in defaults.items():
        if getattr(args, name) != default:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    words += ["--one-task-per-node"] if args.one_task_per_node else []
    return words


def _usable(args: argparse.Namespace) -> int:
    """Begin an attempt: count it, and print the nodes that may be asked how they are."""
    from megallama.errors import EXIT_DONE
    from megallama.train.slurm.attempt import Attempt
    from megallama.train.slurm.history import newest_checkpoint, read_history

    attempt, work = Attempt(args.attempt), args.attempt.parent
    history = read_history(work, attempt.job)
    history.begin(attempt, newest_checkpoint(work))
    history.write(work)
    attempt.begin()
    allocated = args.allocated.split(",")
    usable = [node for node in allocated if not history.leaves_out(node)]
    print(",".join(usable or allocated))
    return EXIT_DONE


def _health(args: argparse.Namespace) -> int:
    import os
    import socket

    from megallama.errors import EXIT_DONE, EXIT_LOST
    from megallama.train.slurm.health import examine

    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    health = examine(node, args.attempt / "health", args.gpus)
    for line in (*health.faults, *health.notes):
        print(f"{node}: {line}")
    return EXIT_LOST if health.faults else EXIT_DONE


def _choose(args: argparse.Namespace) -> int:
    import time

    from megallama.train.slurm.decide import choose

    def decide(attempt: Attempt, job: Job, history: History) -> Decision:
        return choose(attempt, job, history, (attempt.began, time.time()))

    return _decide(args, decide)


def _after(args: argparse.Namespace) -> int:
    from megallama.train.slurm.decide import after

    def decide(attempt: Attempt, job: Job, history: History) -> Decision:
        return after(attempt, job, history, args.code, args.ranks_per_node)

    return _decide(args, decide)


def _decide(args: argparse.Namespace, decide: Callable[[Attempt, Job, History], Decision]) -> int:
    """Print the action for the script, and what to say of it to the job's log."""
    import sys

    from megallama.errors import EXIT_DONE, ConfigError
    from megallama.train.slurm.attempt import Attempt
    from megallama.train.slurm.decide import Job
    from megallama.train.slurm.history import newest_checkpoint, read_history

    attempt, work = Attempt(args.attempt), args.attempt.parent
    history = read_history(work, attempt.job)
    history.see(newest_checkpoint(work))
    job = Job(args.nodes, args.allocated.split(","), args.asked, args.state)
    action, words = decide(attempt, job, history)
    if words:
        print(words, file=sys.stderr)
    try:
        history.write(work)
    except ConfigError as error:  # the next attempt begins with another try, or ends the job
        print(f"job: {error}; forgets this attempt", file=sys.stderr)
    print(action)
    return EXIT_DONE
