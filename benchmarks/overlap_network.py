"""How much communication is hidden on a network, as training steps of two hosts show it.

The hosts are network namespaces of this machine, joined by a veth pair whose rate `tc tbf` limits,
with a process on a core of its own in each and gloo between them. In turn, round after round, they
take a step with overlap none, backward, full, and one with compute alone: the same shards and GEMMs
over groups whose collectives are over at once. Of the time that communication adds to a step,

    hidden = 1 - (t_mode - t_compute) / (t_none - t_compute)

is the part that a mode does not show, for the forward and the backward passes too. Figures are
medians over rounds of the fractions within a round. A step's time is the slower host's.

    sudo python benchmarks/overlap_network.py [--json F] [--rounds N] [--only NAME …] [--trace]

Bytes are moved by the core that computes, and that cannot be hidden: `ceiling` is the fraction that
would be left if only the wait on the wire were hidden, from steps without overlap or rate limit.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

#: Where Debian keeps both tools; root's PATH may lack it.
TOOL_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
ADDRESSES = ("10.177.0.1", "10.177.0.2")
#: The bucket holds a full segment (64 KiB) and little of a message (1 MB), since what it saved up
#: while the link was idle goes out at once. TCP keeps the queue far shorter than the latency, so
#: nothing is lost. Jumbo frames, as on a cluster.
NETWORK = dict(mtu=9000, burst_bytes=72 * 1024, latency="50ms", congestion_control="reno")

#: FLOPs for each byte that travels grow with the width under tensor parallelism and with the tokens
#: of a step under data parallelism: these sizes leave moving bytes a small cost.
WIDE = dict(d_model=2048, layers=4, heads=16, kv_heads=16, ffn=5632, vocab=2048)
NARROW = dict(d_model=512, layers=8, heads=8, kv_heads=8, ffn=1408, vocab=2048)
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "tensor": dict(
        model=WIDE,
        train=dict(sequence_length=512, micro_batch=1, global_batch=1),
        parallel=dict(tensor=2),
        modes=["none", "backward", "full", "compute", "unlimited", "compute-chunked"],
        lead=0,
    ),
    "data": dict(
        model=NARROW,
        train=dict(sequence_length=512, micro_batch=2, global_batch=4),
        parallel=dict(data=2),
        modes=["none", "backward", "compute", "unlimited"],
        hidden=["step"],
        lead=1,
    ),
    "data-accumulating": dict(
        model=NARROW,
        train=dict(sequence_length=512, micro_batch=2, global_batch=16),
        parallel=dict(data=2),
        modes=["none", "backward", "compute", "unlimited"],
        hidden=["step"],
        lead=1,
        rate_of="data",
    ),
}
# Of data ranks only the step's fraction is shown: without overlap they gather weights at the step's
# end and not in the forward, so the phases do not compare.
#: Of each mode: the overlap, whether collectives are free, whether the link is limited.
MODES = {
    "none": ("none", False, True),
    "backward": ("backward", False, True),
    "full": ("full", False, True),
    "compute": ("none", True, True),
    "unlimited": ("none", False, False),
    "compute-chunked": ("full", True, True),
}
PHASES = ("step", "forward", "backward")


class TwoHosts:
    """A context: namespaces and the link between them, gone at its end however it comes.

    The names have this process's number, so that two runs do not meet.
    """

    def __init__(self) -> None:
        self.namespaces = [f"megallama-{os.getpid()}-{host}" for host in (0, 1)]
        self.devices = [f"ml{os.getpid()}h{host}" for host in (0, 1)]

    def __enter__(self) -> TwoHosts:
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def command(self, host: int, argv: Sequence[str]) -> list[str]:
        """`argv` as it is started on a host."""
        return [tool("ip"), "netns", "exec", self.namespaces[host], *argv]

    def limit(self, megabits: float | None) -> None:
        """Let each host send so many Mbit/s; None: as fast as the machine moves bytes."""
        for namespace, device in zip(self.namespaces, self.devices, strict=True):
            place = f"-n {namespace} qdisc replace dev {device} root"
            if megabits is None:
                run_tool("tc", f"{place} noqueue")
            else:
                burst, latency = NETWORK["burst_bytes"], NETWORK["latency"]
                rate = f"rate {round(megabits * 1e6)}bit burst {burst}b latency {latency}"
                run_tool("tc", f"{place} tbf {rate}")

    def _make(self) -> None:
        (left, right), (near, far) = self.namespaces, self.devices
        for namespace in self.namespaces:
            run_tool("ip", f"netns add {namespace}")
        # Made inside the namespaces: nothing of it is ever in this process's own.
        run_tool("ip", f"link add {near} netns {left} type veth peer name {far} netns {right}")
        for host in (0, 1):
            namespace, device = self.namespaces[host], self.devices[host]
            run_tool("ip", f"-n {namespace} link set lo up")
            run_tool("ip", f"-n {namespace} addr add {ADDRESSES[host]}/24 dev {device}")
            run_tool("ip", f"-n {namespace} link set {device} mtu {NETWORK['mtu']} up")
            setting = "/proc/sys/net/ipv4/tcp_congestion_control"
            choose = f"echo {NETWORK['congestion_control']} > {setting}"
            subprocess.run(self.command(host, ["sh", "-c", choose]), check=True)

    def _remove(self) -> None:
        """The link and its queues go with the namespaces."""
        for namespace in self.namespaces:
            delete = [tool("ip"), "netns", "delete", namespace]
            subprocess.run(delete, stderr=subprocess.DEVNULL, check=False)


def tool(name: str) -> str:
    return shutil.which(name, path=TOOL_PATH) or name


def run_tool(name: str, words: str) -> None:
    command = [tool(name), *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip()}")


def check_machine() -> None:
    """End with one line where this machine or user cannot make the two hosts."""
    missing = [name for name in ("ip", "tc") if shutil.which(name, path=TOOL_PATH) is None]
    if missing:
        sys.exit(f"{' and '.join(missing)}: not found; apt-get install iproute2")
    if os.geteuid() != 0:
        sys.exit("network namespaces are for root to make; run this as root")


class Ranks:
    """A context: the process on each host. Both are asked the same, and answer by rank."""

    def __init__(self, network: TwoHosts, experiment: dict[str, Any]) -> None:
        script = str(Path(__file__).with_name("overlap_host.py"))
        cores = sorted(os.sched_getaffinity(0))
        self._processes = [
            subprocess.Popen(
                network.command(rank, [sys.executable, script, str(rank)]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                preexec_fn=partial(os.sched_setaffinity, 0, {cores[rank % len(cores)]}),
            )
            for rank in (0, 1)
        ]
        self._experiment = experiment

    def __enter__(self) -> Ranks:
        self.ask("start", self._experiment)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def ask(self, name: str, arguments: dict[str, Any]) -> list[Any]:
        try:
            for process in self._processes:
                process.stdin.write(json.dumps([name, arguments]) + "\n")
                process.stdin.flush()
            return [json.loads(process.stdout.readline()) for process in self._processes]
        except (BrokenPipeError, json.JSONDecodeError):
            sys.exit("a host's process died; its error is above")


class Measurement:
    """One experiment on its hosts."""

    def __init__(self, network: TwoHosts, ranks: Ranks, experiment: dict[str, Any]) -> None:
        self.network, self.ranks, self.experiment = network, ranks, experiment
        self.rate: float | None = None

    def block(self, mode: str, steps: int = 1) -> list[dict[str, float]]:
        """What each rank measured in a block of steps."""
        overlap, free, limited = MODES[mode]
        self.network.limit(self.rate if limited else None)
        lead = self.experiment["lead"]
        return self.ranks.ask("block", dict(overlap=overlap, free=free, lead=lead, steps=steps))

    def choose_rate(self, ratio: float) -> None:
        """The rate at which a step's bytes take `ratio` of its compute."""
        for mode in self.experiment["modes"]:
            self.block(mode)  # makes the trainers, which is slow, and warms them
        sent = self.block("unlimited")[0]["bytes"]
        seconds = min(slower(self.block("compute"), "step") for _ in range(3))
        self.rate = 8 * sent / (ratio * seconds) / 1e6

    def transfers(self) -> dict[str, list[float]]:
        """Mbit/s that each host receives while both send, with and without the limit."""
        found = {}
        for name, limit in (("limited", self.rate), ("unlimited", None)):
            self.network.limit(limit)
            sent = round(limit * 1e6 / 8 * 2) if limit else 1 << 29
            found[name] = [round(r, 1) for r in self.ranks.ask("transfer", dict(sent=sent))]
        return found

    def rounds(self, count: int) -> dict[str, list[list[dict[str, float]]]]:
        """Of each mode what each round measured of each rank, the modes in turn."""
        found: dict[str, list[Any]] = {mode: [] for mode in self.experiment["modes"]}
        for _ in range(count):
            for mode, rounds in found.items():
                rounds.append(self.block(mode))
        return found


def slower(ranks: Sequence[dict[str, float]], phase: str) -> float:
    return max(rank[phase] for rank in ranks)


def spread(values: Sequence[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return dict(median=round(median, 4), quartiles=[round(low, 4), round(high, 4)])


def figures(
    raw: dict[str, list[list[dict[str, float]]]], phases: Sequence[str] = PHASES
) -> dict[str, Any]:
    """Seconds of each mode, and the hidden fraction of each that overlaps, in these phases."""
    times = {
        mode: {phase: [slower(ranks, phase) for ranks in rounds] for phase in PHASES}
        for mode, rounds in raw.items()
    }

    def hidden(mode: str, phase: str) -> dict[str, Any]:
        rows = zip(*(times[name][phase] for name in (mode, "none", "compute")), strict=True)
        return spread([1 - (t - compute) / (none - compute) for t, none, compute in rows])

    ratios = zip(times["none"]["step"], times["compute"]["step"], strict=True)
    return dict(
        communication_over_compute=spread([none / compute - 1 for none, compute in ratios]),
        seconds={m: {p: spread(times[m][p]) for p in PHASES} for m in times},
        hidden={m: {p: hidden(m, p) for p in phases} for m in ("backward", "full") if m in times},
        ceiling={phase: hidden("unlimited", phase) for phase in phases},
        raw_seconds={
            mode: {p: [[round(rank[p], 4) for rank in r] for r in rounds] for p in PHASES}
            for mode, rounds in raw.items()
        },
    )


def show(name: str, result: dict[str, Any]) -> None:
    """The experiment's table."""
    print(f"\n{name}: {result['rate_megabits']:.0f} Mbit/s", end="")
    print(f" (raw transfer {result['transfers']['limited']}), ", end="")
    print(f"{result['bytes_per_step'] / 1e6:.1f} MB a step and host, communication ", end="")
    print(f"{result['communication_over_compute']['median']:.2f} of compute")
    print(f"{'':16}{'seconds':>24}{'hidden':>30}")
    print(f"{'':16}" + "".join(f"{phase:>10}" for phase in PHASES * 2))
    for mode, seconds in result["seconds"].items():
        row = f"{mode:16}" + "".join(f"{seconds[phase]['median']:10.3f}" for phase in PHASES)
        fractions = result["hidden"].get(mode)
        if mode == "unlimited":
            fractions = result["ceiling"]
        if fractions:
            row += "".join(f"{fractions[phase]['median']:10.1%}" for phase in fractions)
        print(row + ("  (ceiling)" if mode == "unlimited" else ""))


def show_trace(mode: str, events: list[dict[str, Any]]) -> None:
    """Of each line that starts a collective, in order: how long its parts took, in ms.

    wire: from its turn to its end; queued: before its turn; cover: from its start to the wait;
    exposed: the wait.
    """
    print(f"\n{mode}: collectives of one step, rank 0; mean ms each, exposed in all and at most")
    print(f"{'':9}{'n':>4}{'KB':>7}{'wire':>8}{'queued':>8}{'cover':>8}{'exposed':>9}{'max':>7}")
    sites: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for event in events:
        sites.setdefault((event["phase"], event["site"]), []).append(event)
    for (phase, site), rows in sites.items():

        def mean(of: str, since: str, rows: list[dict[str, Any]] = rows) -> float:
            return 1e3 * statistics.fmean(row[of] - row[since] for row in rows)

        exposed = [1e3 * row["exposed"] for row in rows]
        print(
            f"{phase:9}{len(rows):4}{rows[0]['sent'] / 1e3:7.0f}{mean('ended', 'began'):8.1f}"
            f"{mean('began', 'issued'):8.1f}{mean('waited', 'issued'):8.1f}"
            f"{sum(exposed):9.1f}{max(exposed):7.1f}  {site[:72]}"
        )
    for phase in ("forward", "backward", "rest"):
        total = sum(event["exposed"] for event in events if event["phase"] == phase)
        print(f"{phase:9} exposed in all: {1e3 * total:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ratio", type=float, default=0.4, help="of communication to compute")
    parser.add_argument("--rate", type=float, help="Mbit/s, instead of the one that gives --ratio")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--layers", type=int, help="instead of the experiment's, for a short trial")
    parser.add_argument("--trace", action="store_true", help="show each mode's waits; no figures")
    args = parser.parse_args()
    check_machine()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the namespaces go
    results: dict[str, Any] = {}
    with TwoHosts() as network:
        for name in args.only:
            results[name] = measure(network, name, args, results)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report(args, results), indent=2) + "\n")


def measure(
    network: TwoHosts, name: str, args: argparse.Namespace, before: dict[str, Any]
) -> dict[str, Any]:
    """One experiment, shown as it ends."""
    experiment = EXPERIMENTS[name] | dict(lr=1e-4, trace=args.trace)
    if args.layers:
        experiment["model"] = experiment["model"] | dict(layers=args.layers)
    with Ranks(network, experiment) as ranks:
        run = Measurement(network, ranks, experiment)
        run.choose_rate(args.ratio)
        same = before.get(experiment.get("rate_of", ""), {})
        run.rate = args.rate or same.get("rate_megabits") or run.rate
        result: dict[str, Any] = {key: experiment[key] for key in ("model", "train", "parallel")}
        result |= dict(rate_megabits=round(run.rate, 1), transfers=run.transfers())
        if args.trace:
            print(f"\n{name}: {run.rate:.0f} Mbit/s, raw transfer {result['transfers']}")
            for mode in ("none", *[m for m in ("backward", "full") if m in experiment["modes"]]):
                network.limit(run.rate)
                events = ranks.ask("trace", dict(overlap=mode, lead=2))[0]
                show_trace(mode, events)
                result.setdefault("trace", {})[mode] = events
            return result
        raw = run.rounds(args.rounds)
    result["bytes_per_step"] = raw["none"][0][0]["bytes"]
    result |= figures(raw, experiment.get("hidden", PHASES))
    show(name, result)
    return result


def report(args: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    from megallama.train.doctor import processor, versions

    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", "benchmarks/overlap_network.py", *sys.argv[1:]]),
        "hardware": processor() | dict(processes=2, threads_each=1),
        "versions": versions(),
        "network": NETWORK | dict(hosts="network namespaces, veth, tc tbf on both ends"),
        "precision": "fp32",
        "rounds": args.rounds,
        "experiments": results,
    }


if __name__ == "__main__":
    main()
