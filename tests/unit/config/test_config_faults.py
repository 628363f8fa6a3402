"""Every kind of wrong value or key, the line that refuses it, and all of them at once."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.config import ConfigError, parse_config
from megallama.config.aliases import ALIASES, canonical, find_alias
from megallama.config.presets import PRESETS, Preset
from megallama.config.schema import Config, RopeScaling

WHOLE = "is not a whole number; write digits alone, such as 4"
NUMBER = "is not a number; write a number, such as 0.1 or 3.0e-4"
FINITE = "is not finite; write an ordinary number, such as 0.1 or 3.0e-4"
SPLIT = "is not a split of layers; use 'cost', 'even' or a list such as [3, 5]"
TEXT = "write text, in quotes where YAML reads it as something else"


@pytest.mark.parametrize(
    "key, value, line",
    [
        ("model.layers", 2.5, f"model.layers=2.5: {WHOLE}"),
        ("model.layers", 2.0, f"model.layers=2.0: {WHOLE}"),
        ("model.layers", "four", f"model.layers=four: {WHOLE}"),
        ("model.layers", "4", f"model.layers='4': {WHOLE}"),
        ("model.layers", True, f"model.layers=true: {WHOLE}"),
        ("model.layers", None, f"model.layers=null: {WHOLE}"),
        ("model.layers", [4], f"model.layers=[4]: {WHOLE}"),
        ("model.vocab", 0, "model.vocab=0: is too small; give a value above 0"),
        ("train.steps", -1, "train.steps=-1: is too small; give a value above 0"),
        ("train.max_minutes", 0, "train.max_minutes=0: is too small; give a value above 0"),
        ("validation.every", -1, "validation.every=-1: is too small; give 0 or more"),
        ("checkpoint.keep", 0, "checkpoint.keep=0: is too small; give a value above 0"),
        ("optimizer.lr", float("nan"), f"optimizer.lr=.nan: {FINITE}"),
        ("optimizer.lr", float("inf"), f"optimizer.lr=.inf: {FINITE}"),
        ("optimizer.lr", "nan", f"optimizer.lr=nan: {FINITE}"),
        ("optimizer.lr", -0.1, "optimizer.lr=-0.1: is too small; give a value above 0"),
        ("optimizer.lr", True, f"optimizer.lr=true: {NUMBER}"),
        ("optimizer.lr", "fast", f"optimizer.lr=fast: {NUMBER}"),
        ("optimizer.min_lr", -1, "optimizer.min_lr=-1: is too small; give 0 or more"),
        ("optimizer.grad_clip", -1, "optimizer.grad_clip=-1: is too small; give 0 or more"),
        ("optimizer.weight_decay", -1, "optimizer.weight_decay=-1: is too small; give 0 or more"),
        ("optimizer.betas", [0.9, 1], "optimizer.betas.1=1: is too large; give a value below 1"),
        ("optimizer.betas", [0.9], "optimizer.betas.1: is missing; set it"),
        ("optimizer.betas", 0.9, "optimizer.betas=0.9: is not a list; write one as [a, b]"),
        ("train.deterministic", 1, "train.deterministic=1: is not a switch; write true or false"),
        ("train.precision", "fp8", "train.precision=fp8: is not a choice; "),
        ("parallel.overlap", "some", "parallel.overlap=some: is not a choice; "),
        ("parallel.schedule", "2f2b", "parallel.schedule=2f2b: is not a choice; use 'gpipe', "),
        ("parallel.stage_layers", "odd", f"parallel.stage_layers=odd: {SPLIT}"),
        ("parallel.stage_layers", 3, f"parallel.stage_layers=3: {SPLIT}"),
        ("parallel.stage_layers", [2, 0], f"parallel.stage_layers=[2, 0]: {SPLIT}"),
        ("parallel.stage_layers", [1, "1"], f"parallel.stage_layers=[1, '1']: {SPLIT}"),
        ("parallel.timeout_seconds", 0, "parallel.timeout_seconds=0: is too small; give a value"),
        ("train.profile", 3, "train.profile=3: is not a mapping; write its keys as `key: value`"),
        ("train.profile", {}, "train.profile.start: is missing; set it (First step that is rec"),
        ("train.profile", {"start": 0}, "train.profile.start=0: is too small; give a value above"),
        ("log.wandb", True, "log.wandb=true: is not a choice; use 'off', 'offline' or 'online'"),
        ("run.name", 7, f"run.name=7: is not text; {TEXT}"),
        ("run.name", "../up", "run.name=../up: is not a name; use letters, digits, "),
        ("run.root", 7, f"run.root=7: is not a path; {TEXT}"),
        ("data.mixture", {"a": 1}, "data.mixture={a: 1}: is not a list; write one as [a, b]"),
        ("data.phases", [{"mixture": []}], "data.phases.0.mixture=[]: has too few items; "),
        ("model.rope_scaling", 8, "model.rope_scaling=8: is not a mapping; "),
        ("log", 3, "log=3: is not a mapping; write its keys as `key: value`"),
        ("log", [], "log=[]: is not a mapping; write its keys as `key: value`"),
        ("train.tokens", 1.5, f"train.tokens=1.5: {WHOLE}"),
        ("train.tokens", 2**62, f"train.tokens={2**62}: is too large; give a value below 1e+15"),
        ("train.steps", 2**62, f"train.steps={2**62}: is too large; give a value below 1e+15"),
        ("log.every", 10**15, f"log.every={10**15}: is too large; give a value below 1e+15"),
        ("validation.every", 10**400, "validation.every=1000"),
        ("run.seed", 2**63, f"run.seed={2**63}: is too large; give a value below "),
        ("optimizer.lr", 10**400, "optimizer.lr=1000"),
        ("run.name", "a" * 201, f"run.name={'a' * 57}...: is too long; give at most 200 char"),
        ("run.root", "a\0b", 'run.root="a\\0b": holds a NUL character; remove it'),
        ("data.tokenizer", "\0", 'data.tokenizer="\\0": holds a NUL character; remove it'),
        (
            "data.mixture",
            [{"name": "a", "path": "\0", "weight": 1}],
            'data.mixture.0.path="\\0": holds a NUL character; remove it',
        ),
        (
            "data.mixture",
            [{"name": "a" * 201, "path": "p", "weight": 1}],
            f"data.mixture.0.name={'a' * 57}...: is too long; ",
        ),
    ],
)
def test_one_wrong_value_is_one_line(faults, key, value, line):
    lines = faults({key: value})
    assert len(lines) == 1
    assert lines[0].startswith(line)


def test_unknown_preset_is_one_line_and_names_them_all(faults):
    (line,) = faults({"model": {"preset": "llama-8b"}})
    assert line.startswith("model.preset=llama-8b: is not a choice; use 'llama-7b', ")
    assert all(preset in line for preset in PRESETS)
    assert set(PRESETS) == set(get_args(Preset))


def test_missing_keys_and_sections_say_what_they_are():
    with pytest.raises(ConfigError) as caught:
        parse_config({"model": {"preset": "llama-7b"}})
    assert str(caught.value).splitlines() == [
        "train.sequence_length: is missing; set it (Tokens in a sequence)",
        "train.global_batch: is missing; set it (Sequences in an optimizer step, over all ranks)",
        "optimizer.lr: is missing; set it (Peak learning rate)",
        "train.steps: is missing, and so is train.tokens; set one of them",
    ]


def test_all_faults_at_once(faults):
    """Of every section, of values alone and of values together, in one try."""
    lines = faults(
        {
            "run.name": "a b",
            "model.kv_heads": 3,
            "model.layers": "four",
            "model.hidden_size": 4,
            "train.tokens": 10**9,
            "train.micro_batch": 3,
            "parallel.tensor": 0,
            "optimizer.lr": float("nan"),
            "optimizer.schedule": "wsd",
            "data.mixture": [{"name": "a", "path": "p", "weight": 0}],
            "validation.evry": 3,
            "checkpoint": "all",
            "log.every": 0,
            "extra": {"x": 1},
        }
    )
    starts = [
        "run.name=a b: ",
        "model.layers=four: ",
        "parallel.tensor=0: ",
        "optimizer.lr=.nan: ",
        "data.mixture.0.weight=0: ",
        "checkpoint=all: ",
        "log.every=0: ",
        "model.hidden_size=4: ",
        "validation.evry=3: ",
        "extra.x=1: ",
        "model.kv_heads=3: ",
        "train.global_batch=8: ",
        "train.steps=1000: ",
        "optimizer.schedule=wsd: ",
    ]
    assert len(lines) == len(starts)
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    "key, remedy",
    [
        ("model.hidden_size", "use model.d_model"),
        ("model.hidden-size", "use model.d_model"),
        ("model.--hidden-size", "use model.d_model"),
        ("model.hiddenSize", "use model.d_model"),
        ("hidden_size", "use model.d_model"),
        ("train.num_layers", "use model.layers"),
        ("model.num_key_value_heads", "use model.kv_heads"),
        ("train.micro_batch_size", "use train.micro_batch"),
        ("parallelism.tensor_parallel_degree", "use parallel.tensor"),
        ("training.seq_len", "use train.sequence_length"),
        ("training.steps", "use train.steps"),
        ("train.lr", "use optimizer.lr"),
        ("optimizer.clip_grad", "use optimizer.grad_clip"),
        (
            "train.recompute_granularity",
            "use train.saved_activations (full recomputation is layer_input)",
        ),
        (
            "optimizer.use_distributed_optimizer",
            "remove it: how optimizer state is held follows from the layout",
        ),
        (
            "parallel.decoder_first_pipeline_num_layers",
            "use parallel.stage_layers (cost, even, or the layers of each chunk)",
        ),
        ("train.distributed_timeout_minutes", "use parallel.timeout_seconds (in seconds)"),
        ("train.every", "use validation.every or checkpoint.every or log.every"),
        ("model.layrs", "use model.layers"),
        ("train.tie_embedings", "use model.tie_embeddings"),
        ("checkpoint.zzz", "remove it, or use one of every, keep, keep_every, asynchronous"),
        ("zzz", f"remove it; the sections are {', '.join(Config.model_fields)}"),
        ("zzz.yyy", f"remove it; the sections are {', '.join(Config.model_fields)}"),
    ],
)
def test_unknown_keys_get_the_name_to_use(faults, key, remedy):
    assert faults({key: 5}) == [f"{key}=5: is not a key here; {remedy}"]


def test_key_under_another_name_is_not_also_missing(tiny, faults):
    del tiny["model"]["d_model"]
    assert faults({"hidden_size": 64}) == ["hidden_size=64: is not a key here; use model.d_model"]


def test_unknown_section_is_told_key_by_key_unless_it_is_itself_known(faults):
    activations = {"mode": "full"}
    assert faults(
        {"training": {"seq_len": 1, "steps": 2}, "activation_checkpoint": activations}
    ) == [
        "training.seq_len=1: is not a key here; use train.sequence_length",
        "training.steps=2: is not a key here; use train.steps",
        "activation_checkpoint={mode: full}: is not a key here; "
        "use train.saved_activations (full recomputation is layer_input)",
    ]


def test_unknown_keys_inside_a_list(faults):
    source = {"name": "a", "path": "p", "wieght": 1}
    assert faults({"data.mixture": [source]}) == [
        "data.mixture.0.wieght=1: is not a key here; use data.mixture.0.weight"
    ]


def test_keys_that_are_not_text(faults):
    lines = faults({"log": {3: 4, True: 5}, "model.rope_scaling": {1: 2}})
    assert all("is not a key here" in line or "is missing" in line for line in lines)


def test_lines_stay_lines_and_stay_short(faults):
    (name, key) = faults({"run.name": "a\n\nb" + "c" * 100, "log.x\ny": 1})
    assert name.startswith("run.name='a b")
    assert len(name) < 200
    assert key.startswith("log.x y=1: ")


def test_values_that_yaml_cannot_write(faults):
    (line,) = faults({"model.layers": object()})
    assert line.startswith("model.layers=<object object")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
places = [f"{s}.{k}" for s, f in Config.model_fields.items() for k in f.annotation.model_fields]


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from([*places, *Config.model_fields, "other.x"]), anything))
def test_anything_gives_a_config_or_lines(changes):
    mapping: dict = {"model": {"preset": "llama-7b"}}
    for place, value in changes.items():
        section, _, key = place.partition(".")
        if not key:
            mapping[section] = value
        elif isinstance(mapping.setdefault(section, {}), dict):
            mapping[section][key] = value
    try:
        parse_config(mapping)
    except ConfigError as error:
        for line in str(error).splitlines():
            assert ": " in line
            assert "; " in line


def test_aliases_name_keys_that_exist_and_are_not_our_own():
    ours = {place.split(".")[1] for place in places}
    known = {*places, *(f"model.rope_scaling.{k}" for k in RopeScaling.model_fields)}
    names = []
    for alias in ALIASES:
        assert alias.here in known or (not alias.here and alias.note), alias
        names += f"{alias.megatron} {alias.elsewhere}".split()
    assert len(ALIASES) >= 45
    assert len({canonical(name) for name in names}) == len(names), "a name stands twice"
    assert not ours & set(names)
    assert find_alias("--Ffn-Hidden-Size") is find_alias("ffn_hidden_size") is not None
    assert find_alias("nothing") is None
