"""Files, overrides, defaults and the way back to YAML."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from megallama.config import (
    ConfigError,
    config_to_yaml,
    load_config,
    parse_config,
    schema,
)
from megallama.config.schedules import default_virtual_stages
from megallama.spec.schedules.build import NAMES


@pytest.fixture
def file(tiny, tmp_path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(tiny))
    return path


def refusal(path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_defaults(file):
    config = load_config(file)
    assert config.run.name == "small"
    assert config.run.directory == Path("runs/small")
    assert config.run.seed == 1234
    assert config.model.kv_heads == 4
    assert config.model.head_width == 16
    assert config.model.rope_theta == 10000.0
    assert config.model.norm_eps == 1e-5
    assert not config.model.tie_embeddings
    assert config.train.total_steps == 1000
    assert config.train.precision == "bf16"
    assert config.train.saved_activations == "linear_outputs"
    assert config.parallel.data is None
    assert config.parallel.overlap == "backward"
    assert config.parallel.virtual_stages is None
    assert config.parallel.chunks_per_rank == 1
    assert config.parallel.stage_layers == "cost"
    assert not config.parallel.early_step
    assert config.parallel.timeout_seconds == 600
    assert config.train.profile is None
    assert config.optimizer.min_lr == pytest.approx(1e-4)
    assert config.optimizer.warmup_steps == 100
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.optimizer.eps == 1e-8
    assert config.data.is_empty
    assert config.checkpoint.keep == 2
    assert config.log.wandb == "off"


def test_frozen(file):
    config = load_config(file)
    with pytest.raises(ValidationError):
        config.train.steps = 3
    assert hash(config) == hash(load_config(file))


def test_parse_leaves_its_argument_alone(tiny):
    before = copy.deepcopy(tiny)
    assert parse_config(tiny, name="x").run.name == "x"
    assert tiny == before


def test_every_field_is_documented():
    sections = [
        kind
        for kind in vars(schema).values()
        if isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not schema.Config
    ]
    assert len(sections) > 10
    for section in sections:
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            assert field.description.endswith("."), f"{section.__name__}.{name}"


def test_preset_and_the_fields_that_override_it(tiny):
    tiny["model"] = {"preset": "llama2-70b", "vocab": 50000}
    model = parse_config(tiny).model
    assert (model.d_model, model.kv_heads, model.vocab) == (8192, 8, 50000)
    assert model.preset == "llama2-70b"


@pytest.mark.parametrize("tokens", [1_000_000, 1e6, "1e6", "1.0e6"])
def test_steps_follow_from_tokens(tiny, tokens):
    del tiny["train"]["steps"]
    tiny["train"]["tokens"] = tokens
    train = parse_config(tiny).train
    assert train.tokens == 1_000_000
    assert train.total_steps == 3907  # 1e6 / 256 is 3906.25


def test_phases(tiny):
    a, b = {"name": "a", "path": "p", "weight": 1}, {"name": "b", "path": "q", "weight": 2}
    tiny["data"] = {"phases": [{"until_tokens": "1e9", "mixture": [a]}, {"mixture": [a, b]}]}
    phases = parse_config(tiny).data.all_phases
    assert [p.until_tokens for p in phases] == [10**9, None]
    assert [s.name for s in phases[1].mixture] == ["a", "b"]
    tiny["data"] = {"mixture": [a]}
    (only,) = parse_config(tiny).data.all_phases
    assert (only.until_tokens, only.mixture[0].path) == (None, Path("p"))


def test_chunks_on_a_rank_follow_from_the_schedule_unless_they_are_given():
    """The schedules are those that can be made, each with the chunks that it takes."""
    field = schema.Parallel.model_fields["schedule"]
    assert get_args(field.annotation) == NAMES
    for name in NAMES:
        assert schema.Parallel(schedule=name).chunks_per_rank == default_virtual_stages(name)
    assert schema.Parallel(schedule="interleaved", virtual_stages=3).chunks_per_rank == 3


def test_splits_and_a_profile(file):
    config = load_config(
        file,
        [
            "parallel.pipeline=2",
            "parallel.stage_layers=[1, 1]",
            "train.profile={start: 7}",
            "train.profile.steps=2",
        ],
    )
    assert config.parallel.stage_layers == (1, 1)
    assert config.train.profile == schema.Profile(start=7, steps=2)
    assert parse_config(yaml.safe_load(config_to_yaml(config)), name="other") == config
    assert load_config(file, ["parallel.stage_layers=even"]).parallel.stage_layers == "even"


def test_empty_section_is_its_defaults(tiny):
    assert parse_config({**tiny, "data": None, "log": None}) == parse_config(tiny)


def test_yaml_spellings(file):
    """YAML 1.1 reads 1e-4 as text and off as false."""
    config = load_config(file, ["optimizer.lr=1e-4", "log.wandb=off", "optimizer.grad_clip=null"])
    assert config.optimizer.lr == 1e-4
    assert config.optimizer.min_lr == pytest.approx(1e-5)
    assert config.log.wandb == "off"
    assert config.optimizer.grad_clip is None


def test_overrides(file):
    config = load_config(
        file,
        [
            "data.mixture=[{name: a, path: p, weight: 1}]",
            "data.mixture.0.path=x=y",
            "model.rope_scaling.factor=8",
            "model.rope_scaling.low_freq_factor=1",
            "model.rope_scaling.high_freq_factor=4",
            "model.rope_scaling.original_context=8192",
            "train.steps=200",
            "train.steps=300",
        ],
    )
    assert config.data.mixture[0].path == Path("x=y")
    assert config.model.rope_scaling is not None
    assert config.model.rope_scaling.factor == 8
    assert config.train.steps == 300


@pytest.mark.parametrize(
    "override, says",
    [
        ("train.steps", "train.steps: is not section.key=value; "),
        ("=3", "=3: is not section.key=value; "),
        ("data.mixture=[{", "data.mixture=[{: its value is not YAML ("),
        ("run.name=2026-13-45", "run.name=2026-13-45: its value is not YAML (a date or number out"),
        ("run.seed=" + "9" * 5000, "run.seed=999"),
        ("run.seed=0x" + "9" * 5000, "run.seed=...: is too large; "),
        ("model.rope_theta=0x" + "9" * 5000, "model.rope_theta=...: "),
        ("run.name=" + "[" * 5000, "run.name=[[["),
        (
            "log={every: 1, every: 2}",
            "log={every: 1, every: 2}: its value is not YAML (every is set",
        ),
        ("train.steps=017", "train.steps='017': is not a whole number; "),
        ("train.steps=1:30", "train.steps='1:30': is not a whole number; "),
        ("optimizer.lr=1:30.5", "optimizer.lr='1:30.5': is not a number; "),
        ("train.steps.x=1", "train.steps.x=1: names no place"),
        ("data.mixture.0.path=x", "data.mixture={0: {path: x}}: is not a list; "),
        ("foo.bar=1", "foo.bar=1: is not a key here; "),
        ("foo=1", "foo=1: is not a key here; "),
        ("steps=1", "steps=1: is not a key here; use train.steps"),
        ("model=3", "model=3: is not a mapping; "),
        ("train.steps=a\nb", "train.steps=a b: "),
    ],
)
def test_wrong_overrides_take_one_line(file, override, says):
    line = refusal(file, override)
    assert "\n" not in line
    assert line.startswith(says)


def test_a_merged_key_may_be_set_again(tiny, tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text(yaml.safe_dump(tiny) + "log: &a {every: 5}\ncheckpoint: {<<: *a, every: 7}\n")
    assert load_config(path).checkpoint.every == 7


@pytest.mark.parametrize("stem", ["my config", "日本", "a" * 201])
def test_a_file_name_that_names_no_run_says_to_set_the_name(file, stem):
    path = file.rename(file.with_name(f"{stem}.yaml"))
    line = refusal(path)
    assert "\n" not in line
    assert "the default, from the file's name, is " in line
    assert "; set run.name: " in line
    assert load_config(path, ["run.name=fine"]).run.name == "fine"
    assert "file's name" not in refusal(path, "run.name=a b")


def test_wrong_overrides_are_told_with_the_other_faults(file):
    lines = refusal(file, "train.steps", "optimizer.lr=-1", "nope").splitlines()
    assert len(lines) == 3


def test_files_that_cannot_be_read(tmp_path):
    missing = tmp_path / "no.yaml"
    assert refusal(missing) == f"{missing}: no such file; check the path"
    assert refusal(tmp_path) == f"{tmp_path}: Is a directory; name a YAML file"


@pytest.mark.parametrize(
    "content, says",
    [
        (b"model:\n  layers: 2\n  heads: [1, 2\nb: 3\n", " line 4: not YAML ("),
        (b"a: 1\nb: \tx: 3: 4\n", " line 2: not YAML ("),
        (b"\xff\xfe\x00", ": not UTF-8 text; save it as UTF-8"),
        ("model: é\n".encode("latin-1"), ": not UTF-8 text; save it as UTF-8"),
        ("model: {}\n".encode("utf-16-le"), ": not UTF-8 text; save it as UTF-8"),
        (b"train: {}\nmodel: {}\ntrain: {}\n", " line 3: not YAML (train is set on line 1 too)"),
        (b"model:\n  d_model: 32\n  d_model: 32\n", " line 3: not YAML (d_model is set on line 2"),
        (b"run: {name: 2026-13-45}", ": not YAML (a date or number out of range)"),
        (b"run: {seed: " + b"9" * 5000 + b"}", ": not YAML (a date or number out of range)"),
        (b"run: " + b"[" * 5000, ": not YAML (nested too deep)"),
        (b"a: \x01", ": not YAML (it is not text)"),
        (b"- 1\n- 2\n", ": not a mapping of sections; "),
        (b"", ": not a mapping of sections; "),
        (b"just text", ": not a mapping of sections; "),
    ],
)
def test_files_that_are_no_config(tmp_path, content, says):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    line = refusal(path)
    assert line.startswith(f"{path}{says}")
    assert "\n" not in line


def test_imports_no_torch():
    program = "import sys, megallama.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


positive = st.floats(min_value=1e-30, max_value=1e30)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True)
paths = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=10)
sources = st.lists(
    st.fixed_dictionaries({"name": names, "path": paths, "weight": positive}),
    min_size=1,
    max_size=3,
    unique_by=lambda source: source["name"],
)


@st.composite
def mappings(draw):
    kv_heads, groups, half_width = (draw(st.integers(1, 8)) for _ in range(3))
    heads = kv_heads * groups
    micro_batch = draw(st.integers(1, 8))
    lr = draw(positive)
    length = draw(st.sampled_from(["steps", "tokens"]))
    scaling = st.fixed_dictionaries(
        {
            "factor": positive,
            "low_freq_factor": st.floats(1.0, 2.0),
            "high_freq_factor": st.floats(2.5, 8.0),
            "original_context": st.integers(1, 10**6),
        }
    )
    return {
        "run": {"name": draw(names), "root": draw(paths)},
        "model": {
            "d_model": heads * half_width * 2,
            "layers": draw(st.integers(1, 200)),
            "heads": heads,
            "kv_heads": kv_heads,
            "ffn": draw(st.integers(1, 10**5)),
            "vocab": draw(st.integers(1, 10**6)),
            "rope_theta": draw(positive),
            "rope_scaling": draw(st.none() | scaling),
        },
        "train": {
            length: draw(st.integers(10**7, 10**13)),
            "sequence_length": draw(st.integers(1, 100)),
            "global_batch": micro_batch * draw(st.integers(1, 100)),
            "micro_batch": micro_batch,
            "max_minutes": draw(st.none() | positive),
            "profile": draw(st.none() | st.just({"start": 3}) | st.just({"start": 9, "steps": 2})),
        },
        "parallel": {"stage_layers": draw(st.sampled_from(["cost", "even"]))},
        "optimizer": {
            "lr": lr,
            "min_lr": lr * draw(st.floats(0, 1)),
            "betas": [draw(st.floats(0, 0.999)), 0.95],
        },
        "data": draw(st.sampled_from([{}, {"mixture": draw(sources)}])),
        "log": {"wandb": draw(st.sampled_from(["off", "offline", "online"]))},
    }


@settings(max_examples=50, deadline=None)
@given(mappings())
def test_yaml_round_trip(mapping):
    config = parse_config(mapping)
    again = parse_config(yaml.safe_load(config_to_yaml(config)), name="other")
    assert again == config
    assert config_to_yaml(again) == config_to_yaml(config)


def test_round_trip_of_a_preset_through_a_file(tiny, tmp_path):
    tiny["model"] = {"preset": "llama3-8b", "layers": 2}
    config = parse_config(tiny, name="eight")
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(config))
    assert load_config(path) == config
