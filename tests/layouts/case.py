"""A case: one layout of one small model on given batches, as one line of text that repeats it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from megallama.config.load import parse_config
from megallama.config.schema import Config
from megallama.spec.schedules.build import NAMES as SCHEDULES

OVERLAPS = ("none", "backward", "full")
POLICIES = ("linear_outputs", "all", "no_attention_output", "no_gate_up", "layer_input")
#: Which labels are targets: all; 80% at random; another share on every data-parallel rank; as that,
#: and the last rank has none; none at all in the second step, which must then be left out.
LABELS = ("all", "some", "unequal", "empty_rank", "empty_step")
STEPS = 3
LR = 1e-3


@dataclass(frozen=True)
class Case:
    """Defaults are left out of a case's text."""

    tensor: int = 1
    data: int = 1
    pipeline: int = 1
    schedule: str = "1f1b"
    virtual: int = 1
    """Chunks of layers on a pipeline rank, where the schedule leaves it open; zb-v has two."""
    stage_layers: str = "cost"
    """`parallel.stage_layers`; a list as "2,1"."""
    early: bool = False
    """`parallel.early_step`."""
    sequence_parallel: bool = True
    overlap: str = "backward"
    policy: str = "linear_outputs"
    heads: int = 8
    kv_heads: int = 8
    vocab: int = 64
    tied: bool = False
    masked: bool = False
    labels: str = "some"
    micro_batches: int = 1
    """Micro-batches of a step on each rank."""
    micro_batch: int = 1
    precision: str = "fp64"
    wire: str = "fp32"
    """`parallel.gradient_wire`; of bf16 less is asked (`compare`)."""
    late: bool = False
    """Operations between ranks are held up at random, in the threads that run them."""
    d_model: int = 32
    layers: int = 2
    ffn: int = 40
    sequence: int = 16
    seed: int = 0

    @property
    def ranks(self) -> int:
        return self.tensor * self.data * self.pipeline

    @property
    def chunks(self) -> int:
        """Chunks of layers on all pipeline ranks together."""
        return self.pipeline * (2 if self.schedule == "zb-v" else self.virtual)

    @property
    def samples(self) -> int:
        """Samples of a step, over all ranks."""
        return self.data * self.share

    @property
    def sequence_unit(self) -> int:
        """What divides the sequence: the tensor ranks, and the two chunks of full overlap."""
        chunks = 2 if self.overlap == "full" and self.tensor > 1 else 1
        return chunks * (self.tensor if self.sequence_parallel else 1)

    @property
    def share(self) -> int:
        """Samples of a step on each data-parallel rank."""
        return self.micro_batches * self.micro_batch

    @property
    def twin(self) -> Case | None:
        """The same in one process, where that must give the same bits."""
        if self.tensor * self.data > 1 or self.pipeline == 1:
            return None
        alone = Case()
        how = ("pipeline", "schedule", "virtual", "stage_layers", "early", "late", "overlap")
        return replace(self, **{name: getattr(alone, name) for name in how})

    def __str__(self) -> str:
        default = Case()
        shown = {f.name: getattr(self, f.name) for f in fields(self)}
        return " ".join(
            f"{name}={value}"
            for name, value in shown.items()
            if name in ("tensor", "data", "pipeline") or value != getattr(default, name)
        )

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case of a text. Raises ValueError where it names no field or no value of one."""
        default, given = cls(), {}
        for word in text.split():
            name, _, value = word.partition("=")
            if name not in cls.__dataclass_fields__:
                raise ValueError(f"{word}: a case has no field {name!r}")
            given[name] = _value(type(getattr(default, name)), value)
        return replace(default, **given)

    def faults(self) -> list[str]:
        """Why the case cannot be run; empty where it can."""
        tensor = self.tensor
        rules = {
            "tensor divides heads": self.heads % tensor == 0,
            "tensor divides ffn": self.ffn % tensor == 0,
            "kv_heads divides heads": self.heads % self.kv_heads == 0,
            "tensor fits kv_heads": self.kv_heads % tensor == 0 or tensor % self.kv_heads == 0,
            "heads divides d_model, evenly": self.d_model % (2 * self.heads) == 0,
            "schedule is known": self.schedule in SCHEDULES,
            "virtual fits the schedule": self.virtual == 1 or "interleaved" in self.schedule,
            "every chunk has a layer": self.layers >= self.chunks,
            "stage_layers splits the layers": self._splits_layers(),
            "sequence has equal parts": self.sequence % self.sequence_unit == 0,
            "a rank without labels is one of several": self.labels != "empty_rank" or self.data > 1,
            "overlap is known": self.overlap in OVERLAPS,
            "policy is known": self.policy in POLICIES,
            "labels is known": self.labels in LABELS,
            "precision is known": self.precision in ("fp64", "fp32"),
            "wire is known": self.wire in ("fp32", "bf16"),
        }
        return [rule for rule, holds in rules.items() if not holds]

    def _splits_layers(self) -> bool:
        if self.stage_layers in ("cost", "even"):
            return True
        counts = _counts(self.stage_layers)
        return len(counts) == self.chunks and sum(counts) == self.layers and min(counts) > 0

    def config(self, grad_clip: float) -> Config:
        """The run that the case describes."""
        words = self.stage_layers in ("cost", "even")
        parallel: dict[str, Any] = {
            "tensor": self.tensor,
            "data": self.data,
            "pipeline": self.pipeline,
            "schedule": self.schedule,
            "virtual_stages": self.chunks // self.pipeline,
            "stage_layers": self.stage_layers if words else _counts(self.stage_layers),
            "early_step": self.early,
            "sequence_parallel": self.sequence_parallel,
            "overlap": self.overlap,
        }
        if self.wire != "fp32":
            parallel["gradient_wire"] = self.wire
        return parse_config(
            {
                "run": {"name": "case", "seed": self.seed},
                "model": {
                    "d_model": self.d_model,
                    "layers": self.layers,
                    "heads": self.heads,
                    "kv_heads": self.kv_heads,
                    "ffn": self.ffn,
                    "vocab": self.vocab,
                    "tie_embeddings": self.tied,
                },
                "train": {
                    "steps": STEPS,
                    "sequence_length": self.sequence,
                    "global_batch": self.samples,
                    "micro_batch": self.micro_batch,
                    "precision": self.precision,
                    "saved_activations": self.policy,
                },
                "parallel": parallel,
                "optimizer": {
                    "lr": LR,
                    "warmup_steps": 0,
                    "schedule": "constant",
                    "eps": 1e-5,
                    "grad_clip": grad_clip,
                },
                "data": {"mask_documents": self.masked},
            }
        )


def _counts(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _value(kind: type, text: str) -> Any:
    if kind is bool:
        if text not in ("True", "False"):
            raise ValueError(f"{text!r} is not True or False")
        return text == "True"
    return kind(text)
