"""Which keys may change when a run goes on: every key has a class, and each class its way out."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from megallama.config.changes import (
    CLASSES,
    SHAPE,
    Change,
    Kind,
    changes,
    parse_allowed,
    refuse_changes,
    refuse_other_shape,
)
from megallama.config.load import parse_config
from megallama.config.schema import Config
from megallama.errors import ConfigError

S = 16  # tokens of a sample
A = [{"name": "a", "path": "a", "weight": 1}]
B = [{"name": "a", "path": "a", "weight": 1}, {"name": "b", "path": "b", "weight": 2}]
HERE = Path("run/checkpoints/step-00000005")


def values(**sections: dict[str, Any]) -> dict[str, Any]:
    """A whole config as plain values, with changes."""
    mapping: dict[str, Any] = {
        "run": {"name": "r"},
        "model": {"d_model": 16, "layers": 2, "heads": 4, "ffn": 24, "vocab": 300},
        "train": {"steps": 6, "sequence_length": S, "global_batch": 4},
        "optimizer": {"lr": 0.01},
        "data": {"mixture": deepcopy(A)},
        "validation": {"every": 2, "sequences": 5},
    }
    for section, changed in sections.items():
        mapping.setdefault(section, {}).update(changed)
    return parse_config(mapping).model_dump(mode="json")


def keys(found: list[Change]) -> list[str]:
    return [change.key for change in found]


def test_every_key_of_the_schema_has_a_class() -> None:
    schema = {
        f"{section}.{key}"
        for section, field in Config.model_fields.items()
        for key in field.annotation.model_fields  # type: ignore[union-attr]
    }
    assert set(CLASSES) == schema


def test_an_equal_config_has_no_changes() -> None:
    assert changes(values(), values(), 20) == []


#: Key → other values than those of `values`, one for each key that can be changed alone.
OTHERS: dict[str, Any] = {
    "run.name": "s",
    "run.root": "elsewhere",
    "run.seed": 7,
    "run.init_from": "old",
    "model.d_model": 32,
    "model.layers": 3,
    "model.heads": 2,
    "model.kv_heads": 2,
    "model.ffn": 28,
    "model.vocab": 301,
    "model.rope_theta": 5000.0,
    "model.rope_scaling": {
        "factor": 8,
        "low_freq_factor": 1,
        "high_freq_factor": 4,
        "original_context": 16,
    },
    "model.norm_eps": 1e-6,
    "model.tie_embeddings": True,
    "train.steps": 9,
    "train.sequence_length": 32,
    "train.global_batch": 8,
    "train.micro_batch": 2,
    "train.precision": "fp32",
    "train.saved_activations": "all",
    "train.deterministic": True,
    "train.check_replicas_every": 3,
    "train.max_minutes": 5.0,
    "train.profile": {"start": 2},
    "parallel.tensor": 2,
    "parallel.pipeline": 2,
    "parallel.data": 2,
    "parallel.sequence_parallel": False,
    "parallel.schedule": "gpipe",
    "parallel.virtual_stages": 1,
    "parallel.stage_layers": "even",
    "parallel.early_step": True,
    "parallel.overlap": "none",
    "parallel.gradient_wire": "bf16",
    "parallel.timeout_seconds": 5,
    "optimizer.lr": 0.02,
    "optimizer.min_lr": 0.0,
    "optimizer.warmup_steps": 3,
    "optimizer.schedule": "constant",
    "optimizer.betas": [0.9, 0.99],
    "optimizer.eps": 1e-6,
    "optimizer.weight_decay": 0.0,
    "optimizer.grad_clip": 2.0,
    "data.tokenizer": "t.model",
    "data.mixture": B,
    "data.mask_documents": True,
    "validation.every": 0,
    "validation.sequences": 6,
    "checkpoint.every": 5,
    "checkpoint.keep": 5,
    "checkpoint.keep_every": 5,
    "checkpoint.asynchronous": False,
    "log.every": 2,
    "log.wandb": "offline",
    "log.per_source": True,
    "log.layer_norms_every": 2,
    "log.stragglers_every": 2,
}


@pytest.mark.parametrize("key", OTHERS)
def test_a_changed_key_is_told_permitted_or_refused(key: str) -> None:
    section, _, name = key.partition(".")
    found = changes(values(), values(**{section: {name: OTHERS[key]}}), 20)
    assert key in keys(found)
    kind = CLASSES[key]
    refused = [change for change in found if change.kind is kind]
    if kind is Kind.FREE:
        refuse_changes(found, (), HERE, 320)
        return
    with pytest.raises(ConfigError) as caught:
        refuse_changes(refused, (), HERE, 320)
    line = next(line for line in str(caught.value).splitlines() if line.startswith(f"{key}: "))
    change = next(change for change in found if change.key == key)
    assert f"{HERE} was trained with {str(change.old)[:40]}" in line
    assert f"the config says {str(change.new)[:40]}" in line
    if kind is Kind.ALLOW:
        words = line.rpartition("--allow ")[2]
        told = refuse_changes(found, parse_allowed(words), HERE, 320)
        assert key in keys(told)
    else:
        with pytest.raises(ConfigError, match="never"):
            parse_allowed(key)
        assert "--init-from" in line or "new phase" in line


def test_the_way_out_names_all_that_is_missing() -> None:
    new = values(optimizer={"lr": 0.02}, train={"global_batch": 8})
    found = changes(values(), new, 20)
    with pytest.raises(ConfigError) as caught:
        refuse_changes(found, (), HERE, 320)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3  # min_lr follows from lr
    allowed = {line.rpartition("--allow ")[2] for line in lines}
    assert allowed == {"train.global_batch,optimizer.lr,optimizer.min_lr"}
    assert keys(refuse_changes(found, parse_allowed(allowed.pop()), HERE, 320)) == keys(found)


@pytest.mark.parametrize(
    "text, match", [("optimizer.rate", "no.* key"), ("train.steps", "leave it out")]
)
def test_a_permission_that_means_nothing_is_refused(text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse_allowed(f"optimizer.lr,{text}")
    assert parse_allowed("") == frozenset()


def phased(*phases: tuple[int | None, list[dict[str, Any]]]) -> dict[str, Any]:
    listed = [{"until_tokens": until, "mixture": mixture} for until, mixture in phases]
    return values(data={"mixture": [], "phases": listed})


@pytest.mark.parametrize(
    "new, allowed",
    [
        (phased((20 * S, A), (None, B)), True),
        (phased((25 * S, A), (None, B)), True),
        (phased((19 * S + 1, A), (None, B)), True),  # its end is rounded up to a sample
        (phased((19 * S, A), (None, B)), False),
        (phased((10 * S, A), (None, A)), False),  # a phase's mixture begins anew
        (phased((None, B)), False),
        (values(data={"mixture": B}), False),
        (phased((None, A)), True),
    ],
)
def test_a_new_mixture_is_a_new_phase(new: dict[str, Any], allowed: bool) -> None:
    """After 20 samples of mixture A."""
    found = changes(values(), new, 20)
    if allowed:
        assert set(keys(found)) <= {"data.phases"}
        refuse_changes(found, (), HERE, 320)
    else:
        with pytest.raises(ConfigError, match=r"^data\.mixture: .*first 320 tokens"):
            refuse_changes(found, (), HERE, 320)


def test_moved_files_are_no_change() -> None:
    moved = [{**A[0], "path": "elsewhere"}]
    assert changes(values(), values(data={"mixture": moved}), 20) == []


def test_held_out_samples_do_not_matter_without_validation() -> None:
    old = values(validation={"every": 0, "sequences": 5})
    assert changes(old, values(validation={"every": 0, "sequences": 6}), 20) == []
    assert changes(values(), values(validation={"every": 3}), 20) == []


def test_a_key_that_an_older_checkpoint_lacks_had_its_default() -> None:
    old = values()
    for section, key in (("optimizer", "grad_clip"), ("checkpoint", "keep_every")):
        del old[section][key]
    assert changes(old, values(), 20) == []
    assert keys(changes(old, values(optimizer={"grad_clip": 2.0}), 20)) == ["optimizer.grad_clip"]


@pytest.mark.parametrize("key", [key for key in OTHERS if key.startswith("model.")])
def test_weights_are_taken_into_the_same_shapes_only(key: str) -> None:
    new = values(model={key.removeprefix("model."): OTHERS[key]})
    if key in SHAPE:
        with pytest.raises(ConfigError, match=rf"^{key}: the weights of old .*--init-from"):
            refuse_other_shape(values(), new, Path("old"))
    else:
        assert keys(refuse_other_shape(values(), new, Path("old"))) == [key]
