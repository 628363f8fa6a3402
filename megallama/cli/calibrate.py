"""`megallama doctor --calibrate`: a machine file for the planner, with what was measured here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from megallama.train.process import Process
    from megallama.train.signals import StopSignals

HEADER = """\
# Measured by `megallama doctor --calibrate`: {ranks} ranks at once, {device}, {versions}.
# Rates are reached ones, in FLOP/s and bytes/s, as `megallama.plan.hardware` describes each field.
# `network` was not measured apart: it is the link between ranks of this machine.
"""


def calibrate_to(path: Path, nproc: int) -> int:
    """Measure with `nproc` local workers (or those of a launcher), and write the file.

    Raises:
        ConfigError: `path` is no .yaml file that can be written, there is one rank, or several
            nodes.
        LostError: a worker was lost.
    """
    from megallama.errors import EXIT_DONE, ConfigError
    from megallama.files import refuse_os_errors, write_atomic
    from megallama.train.launch import launch

    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--calibrate {path}: is to be a .yaml file, which --gpu takes by name")
    if not path.parent.is_dir():
        raise ConfigError(f"--calibrate {path}: {path.parent} is no directory; make it first")

    def prepare(processes: int) -> int:
        if processes < 2:
            raise ConfigError("--nproc 1: links are measured between ranks; give 2 or more")
        return processes

    def work(processes: int, process: Process, stop: StopSignals) -> int:
        if process.size != process.local_size:
            raise ConfigError("--calibrate: measures one machine; start it on one node")
        from megallama.train.calibrate import calibrate
        from megallama.train.device import device_of

        device = device_of(process.local_rank)
        constants = calibrate(process, device)
        if process.rank == 0:
            with refuse_os_errors("write", path):
                write_atomic(path, as_machine(path.stem, constants, device, processes).encode())
            print(f"wrote {path}; use it as `megallama plan CONFIG --gpus N --gpu {path}`")
        return EXIT_DONE

    return launch(nproc, prepare, work)


def as_machine(name: str, constants: dict[str, Any], device: torch.device, ranks: int) -> str:
    """The file's text; `device`: what was measured."""
    import yaml

    from megallama.plan.hardware import Hardware
    from megallama.train.device import device_name
    from megallama.train.doctor import processor, versions

    machine = Hardware.model_validate({"name": name, **rounded(constants)})
    model = device_name(device) if device.type == "cuda" else processor()["model"]
    found = ", ".join(f"{package} {version}" for package, version in versions().items())
    header = HEADER.format(ranks=ranks, device=model, versions=found)
    return header + yaml.safe_dump(machine.model_dump(), sort_keys=False)


def rounded(value: Any) -> Any:
    """Floats to four digits: more were not measured."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
