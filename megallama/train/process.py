"""This process's place in the job: from our own supervisor, from torchrun, from srun, or alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from megallama.errors import ConfigError, LostError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

#: How long a process waits for a store or for a key that another process is to write.
STORE_TIMEOUT = timedelta(minutes=5)
#: Steps numbered from here are SLURM's own: the batch script, the shell of salloc, the pending one.
FIRST_SPECIAL_STEP = 0xFFFFFFF0


@dataclass(frozen=True)
class Process:
    """This process's place among those of the job."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    #: Where the processes find each other; None: alone.
    store: Store | None
    #: The address that its gloo groups listen on: loopback for our own local workers, who then
    #: need no resolvable host name; None: gloo's choice.
    hostname: str | None


ALONE = Process(0, 1, 0, 1, None, None)


@dataclass(frozen=True)
class Place:
    """What a launcher's environment says, before anything is connected."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    port: int
    #: Whether rank 0 hosts the store: under srun, where there is no agent to do it.
    hosted: bool


def find_place(environ: Mapping[str, str]) -> Place | None:
    """The place given by torchrun's variables, else by srun's, else None.

    Raises:
        ConfigError: a variable is missing, no number or out of range.
    """
    return _torchrun_place(environ) or _srun_place(environ)


def connect(place: Place) -> Process:
    """Reach the job's store. The only process of a job has none.

    Under srun rank 0 hosts the store, so it must be the last to leave.

    Raises:
        LostError: the store does not answer within five minutes, or its port is taken.
    """
    if place.size == 1:
        return ALONE
    try:
        if place.hosted:
            store = open_store(place.host, place.port, is_master=place.rank == 0)
        else:
            from torch.distributed.rendezvous import rendezvous

            store, _, _ = next(rendezvous("env://", timeout=STORE_TIMEOUT))
    except (RuntimeError, ValueError) as error:  # torch's network errors are RuntimeErrors
        reason = str(error).partition("\n")[0]
        raise LostError(
            f"rank {place.rank} does not reach the store at {place.host}:{place.port} ({reason}); "
            "set MASTER_ADDR and MASTER_PORT to an address of rank 0 and a free port of it",
            follows=True,
        ) from error
    return Process(place.rank, place.size, place.local_rank, place.local_size, store, hostname=None)


def open_store(host: str, port: int, **options: Any) -> Store:
    """Connect to the store at this address, or serve it with is_master=True.

    Raises:
        RuntimeError: it does not answer within five minutes, or the port is taken.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    # Who serves does not wait for the others here: the first group does.
    return TCPStore(host, port, timeout=STORE_TIMEOUT, wait_for_workers=False, **options)


def _torchrun_place(environ: Mapping[str, str]) -> Place | None:
    if "RANK" not in environ:
        return None
    size = _number(environ, "WORLD_SIZE", low=1)
    local_size = _number(environ, "LOCAL_WORLD_SIZE", low=1, high=size)
    return Place(
        rank=_number(environ, "RANK", high=size - 1),
        size=size,
        local_rank=_number(environ, "LOCAL_RANK", high=local_size - 1),
        local_size=local_size,
        host=_text(environ, "MASTER_ADDR"),
        port=_number(environ, "MASTER_PORT", low=1, high=65535),
        hosted=False,
    )


def _srun_place(environ: Mapping[str, str]) -> Place | None:
    """None outside a step (sbatch scripts and salloc's shells have many of a step's variables) and
    in a step of one task, which may well start local workers of its own."""
    if "SLURM_STEP_ID" not in environ or "SLURM_PROCID" not in environ:
        return None
    step = _number(environ, "SLURM_STEP_ID")
    # SLURM_NTASKS may still be the whole job's.
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    size = _number(environ, tasks, low=1)
    if step >= FIRST_SPECIAL_STEP or size == 1:
        return None
    local_size = _tasks_here(environ, size)
    return Place(
        rank=_number(environ, "SLURM_PROCID", high=size - 1),
        size=size,
        local_rank=_number(environ, "SLURM_LOCALID", high=local_size - 1),
        local_size=local_size,
        host=_srun_host(environ),
        port=_srun_port(environ, step),
        hosted=True,
    )


def _tasks_here(environ: Mapping[str, str], size: int) -> int:
    """The step's tasks on this node. SLURM_NTASKS_PER_NODE is what the job asked for, so it is
    looked at only where the step's own list is missing."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    if name not in environ:
        return _number(environ, "SLURM_NTASKS_PER_NODE", low=1, high=size)
    try:
        counts = expand_counts(environ[name])
    except ValueError:
        raise _fault(environ, name, "counts such as 8(x2),4") from None
    node = _number(environ, "SLURM_NODEID", high=len(counts) - 1) if len(counts) > 1 else 0
    return counts[node]


def _srun_host(environ: Mapping[str, str]) -> str:
    if environ.get("MASTER_ADDR"):
        return environ["MASTER_ADDR"]
    step = "SLURM_STEP_NODELIST" in environ
    name = "SLURM_STEP_NODELIST" if step else "SLURM_JOB_NODELIST"
    try:
        return expand_nodes(_text(environ, name))[0]
    except ValueError:
        raise _fault(environ, name, "nodes such as node[003-010,12],other7") from None


def _srun_port(environ: Mapping[str, str], step: int) -> int:
    """A port that the step's processes agree on, and that other steps of a node hardly share.

    It stays under 32768, from where Linux gives ports to outgoing connections.
    """
    if environ.get("MASTER_PORT"):
        return _number(environ, "MASTER_PORT", low=1, high=65535)
    return 20000 + (_number(environ, "SLURM_JOB_ID") + 7919 * step) % 12000


def expand_nodes(text: str) -> list[str]:
    """The hosts of a node list in SLURM's notation: `n[08-10,3],m` → n08, n09, n10, n3, m.

    Raises:
        ValueError: the text is no such list.
    """
    return [host for item in _split(text) for host in _expand_item(item)]


def _split(text: str) -> list[str]:
    """Parts between the commas that stand outside brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if depth not in (0, 1):
            raise ValueError(f"brackets of {text!r}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    if depth or "" in parts:
        raise ValueError(f"{text!r}")
    return parts


def _expand_item(item: str) -> list[str]:
    """`r[1-2]n[7-8]` → r1n7, r1n8, r2n7, r2n8."""
    before, bracket, rest = item.partition("[")
    if not bracket:
        return [before]
    ranges, _, after = rest.partition("]")
    tails = _expand_item(after)
    return [
        before + n + t for part in ranges.split(",") for n in _expand_range(part) for t in tails
    ]


def _expand_range(text: str) -> list[str]:
    """`08-10` → 08, 09, 10; a number alone is itself. The zeros in front are kept."""
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise ValueError(f"{text!r}")
    if not dash:
        return [first]
    if int(last) < int(first):
        raise ValueError(f"{text!r}")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def expand_counts(text: str) -> list[int]:
    """SLURM's tasks per node: `8(x2),4` → 8, 8, 4.

    Raises:
        ValueError: the text is no such list.
    """
    counts: list[int] = []
    for part in text.split(","):
        count, times, rest = part.partition("(x")
        if times and not rest.endswith(")"):
            raise ValueError(f"{part!r}")
        counts += [int(count)] * (int(rest[:-1]) if times else 1)
    return counts


def _text(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name, "")
    if not value:
        raise ConfigError(
            f"{name} is not set, but other variables of a launcher are; start with torchrun or "
            f"srun, or {_way_out(environ)}"
        )
    return value


def _number(environ: Mapping[str, str], name: str, low: int = 0, high: int | None = None) -> int:
    value = _text(environ, name)
    if not value.isdecimal() or not low <= int(value) <= (int(value) if high is None else high):
        raise _fault(
            environ, name, f"a number from {low}" + ("" if high is None else f" to {high}")
        )
    return int(value)


def _fault(environ: Mapping[str, str], name: str, wanted: str) -> ConfigError:
    return ConfigError(
        f"{name}={environ[name]}: the launcher should have set {wanted}; start with torchrun or "
        f"srun, or {_way_out(environ)}"
    )


def _way_out(environ: Mapping[str, str]) -> str:
    """What to do for a run of one's own: without this variable, no launcher is seen."""
    return f"unset {'RANK' if 'RANK' in environ else 'SLURM_STEP_ID'} for a run without a launcher"
