"""A machine as the planner sees it: the constants of a YAML file, one file a kind of machine.

The files of this package are in `hardware/`; a user's own is named by its path. Rates are those
that a program reaches, not data sheets' peaks, unless the field says so. Units: bytes, seconds,
FLOP/s, bytes/s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from megallama.config import ConfigError
from megallama.config.load import read_yaml
from megallama.config.values import Count, NonNegative, Positive, Strict

FOLDER = Path(__file__).parent / "hardware"


class Rates(Strict):
    """FLOP/s by the type of the operands."""

    bf16: Positive
    fp32: Positive
    fp64: Positive


class Gemm(Strict):
    peak: Positive | None = None
    """Data-sheet peak that utilisation is measured by; null: no utilisation is given."""
    flops: Rates
    """Reached by a large product."""
    dgrad: Positive = 1.0
    """Rate of a product for an input's gradient, relative to the forward's."""
    wgrad: Positive = 1.0
    """Rate of a product for a weight's gradient, which is added into a wider buffer."""
    units: Count = 1
    """Multiprocessors, over which a product's tiles are dealt out in waves; 1: no waves."""
    tail: NonNegative = 0.0
    """Waves that a product loses because its last one is not full; 0.5 on average."""
    addition: NonNegative = 0.0
    """Of the time to read and write a weight's gradient, what a product that is added into it
    takes longer: a tile is added when its product is done, and little runs under that."""
    depth: NonNegative = 0.0
    """Depth k at which a product reaches half its rate: filling and emptying a tile's pipeline."""


class Attention(Strict):
    forward: Positive
    """Rate of the flash kernel on long sequences, counted causal: half of S²."""
    backward: Positive
    length: NonNegative = 0.0
    """Sequence length at which it reaches half its rate."""


class Shares(Strict):
    """Of the memory's bandwidth, what a kind of kernel reaches."""

    norm: Positive = 1.0
    """RMSNorm's forward, with the addition before it; LayerNorm's."""
    norm_backward: Positive = 1.0
    rotate: Positive = 1.0
    """Rotary embedding, either way."""
    activation: Positive = 1.0
    """SwiGLU's forward, GELU's."""
    activation_backward: Positive = 1.0
    softmax: Positive = 1.0
    """Of an unfused attention: scale, mask, softmax, dropout; either way."""
    loss: Positive = 1.0
    """Cross-entropy over the logits, either way."""
    embedding: Positive = 1.0
    """Rows looked up; their gradients added."""
    plain: Positive = 1.0
    """Copies and sums of whole tensors; dropout."""
    optimizer: Positive = 1.0
    """AdamW, norms of gradients, gradients set to zero."""


class Memory(Strict):
    capacity: Count
    """Bytes of a device, or of a host for one process on a CPU."""
    bandwidth: Positive
    """Reached by a copy, read and written bytes together."""
    kernel_seconds: NonNegative = 0.0
    """From the start of one small kernel to the start of the next."""
    shares: Shares = Shares()


class Link(Strict):
    bandwidth: Positive
    """Bytes/s a rank: bus bandwidth of a collective as nccl-tests count it, or of a message."""
    start_seconds: NonNegative
    """Of a collective or message, whatever its size."""
    hop_seconds: NonNegative
    """Each further step of a ring."""


class Contention(Strict):
    """By how much each is slower while both go on: 0.1 takes a tenth longer."""

    compute: NonNegative = 0.0
    collective: NonNegative = 0.0
    """On a GPU next to nothing, since a collective keeps its multiprocessors; where cores do both,
    as gloo's do, what the kernels take."""


class Hardware(Strict):
    """One kind of machine: `ranks` devices a node, `node` links inside it, `network` between."""

    name: str
    device: Literal["cuda", "cpu"]
    gemm: Gemm
    attention: Attention
    memory: Memory
    ranks: Count
    """Devices (or processes) of a node."""
    node: Link
    network: Link
    contention: Contention = Contention()

    def with_network(self, share: float) -> Hardware:
        """The same with that share of the bandwidth between nodes, as on a congested network."""
        bandwidth = share * self.network.bandwidth
        network = self.network.model_copy(update={"bandwidth": bandwidth})
        return self.model_copy(update={"network": network})


def known_names() -> list[str]:
    """The machines that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_hardware(name_or_path: str) -> Hardware:
    """A machine of this package by its name, or of a user's YAML file by its path.

    Raises:
        ConfigError: no such machine, or a file that does not describe one; one line a fault.
    """
    known = known_names()
    path = Path(name_or_path)
    if name_or_path in known:
        path = FOLDER / f"{name_or_path}.yaml"
    elif path.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"machine {name_or_path!r}: is not known; use one of {', '.join(known)}, or the path "
            "of a .yaml file"
        )
    try:
        return Hardware.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError("\n".join(_faults(path, error))) from None


def _faults(path: Path, error: ValidationError) -> list[str]:
    lines = []
    for detail in error.errors(include_url=False):
        key = ".".join(map(str, detail["loc"])) or "the file"
        message = detail["msg"]
        if detail["type"] == "extra_forbidden":
            message = "is not a constant of a machine; remove it"
        elif detail["type"] == "missing":
            message = "is missing; give its value"
        lines.append(f"{path}: {key}: {message[0].lower()}{message[1:]}")
    return lines
