"""What a run is: every key, its unit and its default, as frozen pydantic sections.

Values that are wrong on their own are refused here; values that do not fit together are refused in
`checks`. Build a `Config` with `load.load_config` or `load.parse_config`, which run both and report
every fault at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from megallama.config.presets import PRESETS, Preset
from megallama.config.schedules import default_virtual_stages
from megallama.config.values import (
    Count,
    CountOrZero,
    Flag,
    Fraction,
    Layers,
    Name,
    NonNegative,
    Number,
    Place,
    Positive,
    Section,
    Seed,
    Split,
    Strict,
    Tokens,
)


def _off(value: object) -> object:
    """YAML 1.1 reads a bare `off` as false."""
    return "off" if value is False else value


class Run(Section):
    name: Name
    """Name of the run and of its directory. Default: the config file's name without its suffix."""
    root: Place = Path("runs")
    """The folder that holds the run directories."""
    seed: Seed = 1234
    """Decides initial weights and data order, at any layout."""
    init_from: Place | None = None
    """Checkpoint, or run directory, whose weights a new run begins with; null: drawn by seed."""

    @property
    def directory(self) -> Path:
        """Where this run's config, metrics and checkpoints go."""
        return self.root / self.name


class RopeScaling(Strict):
    """Llama 3.1's frequency scaling (arXiv 2407.21783), which lengthens a trained context."""

    factor: Positive
    """By how much low frequencies are slowed."""
    low_freq_factor: Positive
    """Wavelengths above original_context / low_freq_factor are slowed by the whole factor."""
    high_freq_factor: Positive
    """Wavelengths below original_context / high_freq_factor are left as they are."""
    original_context: Count
    """Context before the scaling, in tokens."""


class Model(Section):
    preset: Preset | None = None
    """A published shape; the other keys of this section override its values."""
    d_model: Count
    """Width of the residual stream."""
    layers: Layers
    """Number of decoder layers."""
    heads: Count
    """Number of query heads. The head width, d_model / heads, must be whole and even."""
    kv_heads: Count = Field(default_factory=lambda valid: valid["heads"])
    """Number of key/value heads; must divide heads. Default: heads."""
    ffn: Count
    """Width of the SwiGLU feed-forward layer."""
    vocab: Count
    """Number of token ids."""
    rope_theta: Positive = 10000.0
    """Base of the rotary position frequencies."""
    rope_scaling: RopeScaling | None = None
    """Frequency scaling as in Llama 3.1, or null."""
    norm_eps: Positive = 1e-5
    """Added to the mean square inside RMSNorm."""
    tie_embeddings: Flag = False
    """Use the embedding's weight as the output weight too."""

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and isinstance(given.get("preset"), str):
            return {**PRESETS.get(given["preset"], {}), **given}
        return given

    @property
    def head_width(self) -> int:
        """Width of one head, E = D / H."""
        return self.d_model // self.heads


class Profile(Strict):
    start: Count
    """First step that is recorded."""
    steps: Count = 1
    """Number of steps that are recorded."""
    ranks: tuple[CountOrZero, ...] | None = Field(default=None, min_length=1)
    """Ranks that are recorded; null: all of them."""


class Spike(Strict):
    factor: Annotated[Number, Field(gt=1)]
    """A loss over so many times the median of the steps before it is a spike."""
    window: Annotated[Count, Field(le=10_000)] = 100
    """Steps of that median. Until there are so many, nothing is a spike."""
    rewind: Count = 1
    """Steps to go back at least: to the newest checkpoint so far back, else to the oldest."""
    most: Count = 10
    """Number of times to go back before the run is given up (exit code 1)."""


class Train(Section):
    steps: Count | None = None
    """Length of the run in optimizer steps. Give this or tokens."""
    tokens: Tokens | None = None
    """Length of the run in tokens, rounded up to whole steps. Give this or steps."""
    sequence_length: Count
    """Tokens in a sequence."""
    global_batch: Count
    """Sequences in an optimizer step, over all ranks."""
    micro_batch: Count = 1
    """Sequences in one forward pass of one data-parallel rank."""
    precision: Literal["bf16", "fp32", "fp64"] = "bf16"
    """Type of weights and activations in the passes; gradients and masters are fp32 or wider."""
    saved_activations: Literal[
        "linear_outputs", "all", "no_attention_output", "no_gate_up", "layer_input"
    ] = "linear_outputs"
    """What a layer keeps from its forward for its backward; the rest is recomputed."""
    deterministic: Flag = False
    """Ask for the same bits on every run, also on CUDA; slower there."""
    check_replicas_every: CountOrZero = 1
    """Steps from one comparison of the weights with their owner's masters, and of what several
    tensor ranks hold, to the next (before each save, too); 0: never."""
    spike: Spike | None = None
    """Go back where the loss jumps, and skip the samples from there to the jump; null: go on."""
    max_minutes: Positive | None = None
    """Save and stop after so many minutes (exit code 75); null: no limit."""
    profile: Profile | None = None
    """Steps to record as a timeline in RUN_DIR/profiles/, or null. A file RUN_DIR/profile, empty or
    with these keys, asks for the same while the run goes on."""

    @property
    def total_steps(self) -> int:
        """Length of the run in optimizer steps, however it was given."""
        return self.steps or steps_of(self.tokens or 0, self.sequence_length, self.global_batch)


class Parallel(Section):
    tensor: Count = 1
    """Ranks that share each layer."""
    pipeline: Count = 1
    """Ranks that share the stack of layers."""
    data: Count | None = None
    """Replicas of the model; null: what tensor and pipeline leave of the ranks."""
    sequence_parallel: Flag = True
    """Split norms and the residual stream over the tensor ranks, along the sequence."""
    schedule: Literal[
        "gpipe",
        "1f1b",
        "interleaved",
        "zb-h1",
        "zb-h2",
        "zb-v",
        "1f1b-fused",
        "interleaved-fused",
    ] = "1f1b"
    """Order of forward and backward passes in the pipeline."""
    virtual_stages: Count | None = None
    """Chunks of layers on each pipeline rank. Default: 2 for interleaved, interleaved-fused and
    zb-v, else 1."""
    stage_layers: Split = "cost"
    """Layers of each chunk, in model order. cost: even in compute, with the embedding and the head
    weighed; even: even in layers; or a list, such as [3, 5]."""
    early_step: Flag = False
    """Update before the global gradient norm is known, and take the update back where clipping or a
    value that is not finite says so; costs a copy of the optimizer's shard."""
    overlap: Literal["none", "backward", "full"] = "backward"
    """Which passes hide their communication under compute; full: the forward in two chunks too."""
    gradient_wire: Literal["fp32", "bf16"] = "fp32"
    """Type in which gradients travel between data ranks; they are added in fp32 either way."""
    timeout_seconds: Annotated[Count, Field(le=10**7)] = 600
    """How long a rank waits for another before it calls it lost, in seconds."""

    @property
    def chunks_per_rank(self) -> int:
        """Chunks of layers on each pipeline rank, given or as the schedule takes them."""
        return self.virtual_stages or default_virtual_stages(self.schedule)

    @property
    def forward_chunks(self) -> int:
        """Chunks of a micro-batch's tokens in the forward: two hide each other's communication."""
        return 2 if self.overlap == "full" and self.tensor > 1 else 1


class Optimizer(Section):
    lr: Positive
    """Peak learning rate."""
    min_lr: NonNegative = Field(default_factory=lambda valid: valid["lr"] / 10)
    """Learning rate at the end of the schedule. Default: lr / 10."""
    warmup_steps: CountOrZero = 100
    """Steps of linear warm-up from 0 to lr."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Course of the rate after warm-up; wsd: constant, then decay over the last decay_steps."""
    decay_steps: Count | None = None
    """Length of the final decay in steps; for the wsd schedule alone."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: Positive = 1e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: NonNegative = 0.1
    """AdamW's decoupled weight decay, as a multiple of the learning rate."""
    grad_clip: NonNegative | None = 1.0
    """Largest global gradient norm; 0 or null: no clipping."""


class Source(Strict):
    name: Name
    """Name of the source in logs and metrics."""
    path: Place
    """PREFIX of the source's token files, PREFIX.bin and PREFIX.idx."""
    weight: Positive
    """Share of the tokens, relative to the other weights of the mixture."""


class Phase(Strict):
    until_tokens: Tokens | None = None
    """Token count of the run at which the phase ends; null in the last: the run's end."""
    mixture: tuple[Source, ...] = Field(min_length=1)
    """Sources of the phase."""


class Data(Section):
    tokenizer: Place | None = None
    """Tokenizer file."""
    mixture: tuple[Source, ...] = ()
    """Sources of the whole run. Give this or phases, or neither (synthetic data, for bench)."""
    phases: tuple[Phase, ...] = ()
    """Mixtures that follow each other; the last lasts to the end of the run."""
    mask_documents: Flag = False
    """Keep attention inside a document where a sequence holds several."""

    @property
    def all_phases(self) -> tuple[Phase, ...]:
        """The phases, a mixture being the only one; empty where the config names no data."""
        return (Phase(mixture=self.mixture),) if self.mixture else self.phases

    @property
    def is_empty(self) -> bool:
        """Whether the config names no data."""
        return not self.all_phases


class Validation(Section):
    every: CountOrZero = 0
    """Steps from one validation to the next; 0: never."""
    sequences: Count = 64
    """Sequences held out of each source."""


class Checkpoint(Section):
    every: CountOrZero = 0
    """Steps from one checkpoint to the next; 0: only at the end of the run."""
    keep: Count = 2
    """Number of newest checkpoints kept. Older ones go once a newer one is on the disk, read back
    and found intact."""
    keep_every: CountOrZero = 0
    """Checkpoints of steps that are multiples of this are kept for ever; 0: none is."""
    asynchronous: Flag = True
    """Write checkpoints behind the steps: a step waits for a copy in host memory, 12 bytes a
    parameter divided by the ranks, and not for the disk. The last one of a run is waited for."""


class Log(Section):
    every: Count = 1
    """Steps from one console line to the next."""
    wandb: Annotated[Literal["off", "offline", "online"], BeforeValidator(_off)] = "off"
    """Weights & Biases: not used, written to disk, or sent."""
    per_source: Flag = False
    """Log the loss of each data source."""
    layer_norms_every: CountOrZero = 0
    """Steps from one log of each layer's gradient norm and input RMS to the next; 0: never."""
    stragglers_every: CountOrZero = 50
    """Steps over which the ranks' own time is compared, to name one that is slow; 0: never."""


class Config(Strict):
    """A run. Every section is present, with its defaults resolved."""

    run: Run
    model: Model
    train: Train
    parallel: Parallel
    optimizer: Optimizer
    data: Data
    validation: Validation
    checkpoint: Checkpoint
    log: Log


def steps_of(tokens: int, sequence_length: int, global_batch: int) -> int:
    """Steps that cover `tokens`, rounded up."""
    return -(-tokens // (sequence_length * global_batch))
