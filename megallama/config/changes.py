"""What of a run's config may change when it goes on from a checkpoint, and what the change needs.

`CLASSES` holds every key of the schema. What decides how a step is computed but not what it means
changes freely; what decides the numbers needs `--allow KEY`; what the saved tensors or the count of
samples would no longer fit never changes. The data of steps that are done stay as they were: a new
mixture is a new phase.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from megallama.config.faults import shorten
from megallama.config.schema import Config
from megallama.errors import ConfigError

Values = Mapping[str, Any]  # a config as plain values, section by section
#: Phases: the sample that each ends before (None: the run's end), and its sources' weights.
Mixtures = list[tuple[int | None, list[tuple[str, float]]]]


class Kind(Enum):
    """What a changed key needs."""

    FREE = "nothing"
    ALLOW = "--allow"
    NEVER = "another run"


#: Every key of the schema, by what a change of it needs. `data.mixture` stands for the mixtures of
#: the samples so far, whichever key they were written under, `data.phases` for all of them, and
#: `validation.every` for whether samples are held out. Token files and the tokenizer may move: they
#: are known by their content, which whoever opens them compares.
CLASSES = {
    key: kind
    for kind, sections in {
        Kind.FREE: {
            "run": "name root init_from",
            "model": "preset",
            "train": "steps tokens micro_batch saved_activations deterministic max_minutes profile "
            "check_replicas_every",
            "parallel": "tensor pipeline data sequence_parallel schedule virtual_stages "
            "stage_layers early_step overlap timeout_seconds",
            "data": "tokenizer phases",
            "checkpoint": "every keep keep_every asynchronous",
            "log": "every wandb per_source layer_norms_every stragglers_every",
        },
        Kind.ALLOW: {
            "train": "global_batch precision spike",
            "parallel": "gradient_wire",
            "optimizer": "lr min_lr warmup_steps schedule decay_steps betas eps weight_decay "
            "grad_clip",
            "data": "mask_documents",
        },
        Kind.NEVER: {
            "run": "seed",
            "model": "d_model layers heads kv_heads ffn vocab rope_theta rope_scaling norm_eps "
            "tie_embeddings",
            "train": "sequence_length",
            "data": "mixture",
            "validation": "every sequences",
        },
    }.items()
    for section, keys in sections.items()
    for key in (f"{section}.{name}" for name in keys.split())
}
#: Keys that say where a run and its files are: not worth a line.
PLACES = {"run.name", "run.root", "run.init_from", "data.tokenizer", "model.preset"}
#: What `--init-from` must have alike; the other keys of the model are no shapes.
SHAPE = (
    *("model.d_model", "model.layers", "model.heads", "model.kv_heads", "model.ffn"),
    *("model.vocab", "model.tie_embeddings"),
)


@dataclass(frozen=True)
class Change:
    """A key that has another value than when the checkpoint was saved."""

    key: str
    old: object
    new: object

    @property
    def kind(self) -> Kind:
        return CLASSES[self.key]

    def __str__(self) -> str:
        return f"{self.key} {shorten(str(self.old))} → {shorten(str(self.new))}"


def changes(old: Values, new: Values, samples: int) -> list[Change]:
    """What differs between a checkpoint's config and a run's, after so many samples."""
    was, is_ = (dict(_views(config, samples)) for config in (old, new))
    return [
        Change(key, was[key], value)
        for key, value in is_.items()
        if key in was and was[key] != value
    ]


def parse_allowed(text: str) -> frozenset[str]:
    """The keys of `--allow KEY[,KEY]`.

    Raises:
        ConfigError: one of them is no key, or needs no permission, or cannot be permitted.
    """
    keys = [key for key in text.split(",") if key]
    for key in keys:
        kind = CLASSES.get(key)
        if kind is None:
            raise ConfigError(f"--allow {key}: is not a key; write for example optimizer.lr")
        if kind is Kind.FREE:
            raise ConfigError(f"--allow {key}: may change without it; leave it out")
        if kind is Kind.NEVER:
            raise ConfigError(f"--allow {key}: may never change in a run; {_WAYS_OUT}")
    return frozenset(keys)


_WAYS_OUT = (
    "set it back, choose another run.name to start anew, or begin from the weights with --init-from"
)


def refuse_changes(
    found: Iterable[Change], allowed: Collection[str], directory: Path, samples_tokens: int
) -> list[Change]:
    """The changes that are worth telling; `samples_tokens`: tokens that the run has seen.

    Raises:
        ConfigError: some may not be made, or not without `--allow`. One line each.
    """
    found = list(found)
    lines = []
    missing = [c.key for c in found if c.kind is Kind.ALLOW and c.key not in allowed]
    for change in found:
        key = change.key
        if change.kind is Kind.FREE or key in allowed:
            continue
        if change.kind is Kind.ALLOW:
            remedy = f"set it back, or change it with --allow {','.join(missing)}"
        elif key == "data.mixture":
            remedy = (
                "a new mixture is a new phase: keep what the first "
                f"{samples_tokens:,} tokens had in data.phases, and add it there"
            )
        else:
            remedy = _WAYS_OUT
        was, now = shorten(str(change.old)), shorten(str(change.new))
        lines.append(f"{key}: {directory} was trained with {was}, the config says {now}; {remedy}")
    if lines:
        raise ConfigError("\n".join(lines))
    return [change for change in found if change.key not in PLACES]


def refuse_other_shape(old: Values, new: Values, path: Path) -> list[Change]:
    """What else of the model differs where only the weights of `path` are taken.

    Raises:
        ConfigError: the weights there have other shapes than the run's.
    """
    was, is_ = (dict(_flat(config)) for config in (old, new))
    differing = [
        Change(key, was[key], value)
        for key, value in is_.items()
        if key.startswith("model.") and key not in PLACES and key in was and was[key] != value
    ]
    for change in differing:
        if change.key in SHAPE:
            raise ConfigError(
                f"{change.key}: the weights of {path} are of a model with {change.old}, the config "
                f"says {change.new}; set it to {change.old}, or name another --init-from"
            )
    return differing


def _flat(config: Values) -> Iterator[tuple[str, Any]]:
    """Every key with its value; one that an older config lacks has the schema's default."""
    for section, field in Config.model_fields.items():
        model: Any = field.annotation
        for name, inner in model.model_fields.items():
            value = config.get(section, {}).get(name, inner.get_default())
            if value is not PydanticUndefined:
                yield f"{section}.{name}", value


def _views(config: Values, samples: int) -> Iterator[tuple[str, Any]]:
    """Every key with what counts of it, after so many samples of training."""
    values = dict(_flat(config))
    held_out = bool(values.get("validation.every"))
    values["validation.every"] = "some" if held_out else "0"
    if not held_out:
        del values["validation.sequences"]
    mixtures = _mixtures(config)
    values["data.phases"] = mixtures
    values["data.mixture"] = _done(mixtures, max(1, samples))
    yield from values.items()


def _mixtures(config: Values) -> Mixtures:
    """Every phase of a config: the sample that it ends before, and its sources' weights."""
    data, length = config["data"], config["train"]["sequence_length"]
    phases = data["phases"] or [{"until_tokens": None, "mixture": data["mixture"]}]
    found: Mixtures = []
    for phase in phases:
        until = phase["until_tokens"]
        end = None if until is None else -(-until // length)
        found.append((end, [(source["name"], source["weight"]) for source in phase["mixture"]]))
    return found


def _done(mixtures: Mixtures, samples: int) -> Mixtures:
    """Of the phases, what the first samples were drawn from."""
    found: Mixtures = []
    first = 0
    for until, shares in mixtures:
        end = samples if until is None else min(samples, until)
        if end > first:
            found.append((end, shares))
            first = end
    return found
