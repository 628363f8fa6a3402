"""What tests of whole runs share: a small corpus with its tokenizer and token files, tiny configs.

Two sources, `code` and `prose`, of one tokenizer of 300 tokens, made once a session.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from megallama.config.load import parse_config
from megallama.config.schema import Config
from megallama.data.build import build
from megallama.data.tokenizer import Tokenizer, train_tokenizer
from megallama.train.console import Console
from megallama.train.metrics import Row, read_metrics

VOCAB, LENGTH = 300, 32
SOURCES = ("code", "prose")


@dataclass(frozen=True)
class TinyData:
    """The tokenizer, and the prefix of each source's token files."""

    tokenizer: Path
    prefixes: dict[str, Path]


def pytest_configure() -> None:
    gc.disable()  # until all tests are collected: nothing of them is garbage
    _take_turns()


def pytest_collection_finish() -> None:
    """10,000 tests and their modules stay: no collection of garbage need look at them again."""
    gc.freeze()
    gc.enable()


def _take_turns() -> None:
    """Processes that tests start do not interrupt each other when a message wakes them.

    A rank that is interrupted while it holds a gloo connection's lock leaves gloo's own thread
    asking for the lock until it runs again: 45% of the processor time of two ranks on busy cores.
    """
    if hasattr(os, "SCHED_BATCH"):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Test models are tiny: two threads gain nothing, and on busy cores they wait for each other.

    Measured with both cores busy: 300 small products take 7 s on two threads, 0.01 s on one.
    """
    torch.set_num_threads(1)


def _documents(words: str, count: int, seed: int) -> list[str]:
    """Texts of 5 to 40 words drawn from `words`: many documents a sequence, and some over one."""
    generator = np.random.default_rng(seed)
    choices = words.split()
    return [" ".join(generator.choice(choices, generator.integers(5, 40))) for _ in range(count)]


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    folder = tmp_path_factory.mktemp("tiny-data")
    texts = {
        "code": _documents("def return if else for in x y sum len (a, b): + 12 = None", 60, 1),
        "prose": _documents("the fox and a dog sleep under an old tree near the river", 60, 2),
    }
    corpora = {}
    for name, documents in texts.items():
        corpora[name] = folder / f"{name}.jsonl"
        corpora[name].write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    tokenizer = folder / "tokenizer.model"
    train_tokenizer(list(corpora.values()), VOCAB, tokenizer)
    for name, corpus in corpora.items():
        build([corpus], tokenizer, folder / name, "text", 1)
    return TinyData(tokenizer, {name: folder / name for name in SOURCES})


Mapping = dict[str, Any]
MakeConfig = Callable[..., Config]
ConfigFile = Callable[..., Path]


@pytest.fixture
def tiny_mapping(tiny_data: TinyData, tmp_path: Path) -> Mapping:
    """A config of 6 steps that validates every 2 and saves every 3; runs go to tmp_path/runs."""
    return {
        "run": {"name": "tiny", "root": str(tmp_path / "runs")},
        "model": {
            "d_model": 16,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "ffn": 24,
            "vocab": VOCAB,
            "tie_embeddings": True,
        },
        "train": {
            "steps": 6,
            "sequence_length": LENGTH,
            "global_batch": 4,
            "micro_batch": 2,
            "precision": "fp32",
        },
        "optimizer": {"lr": 0.01, "warmup_steps": 2},
        "data": {
            "tokenizer": str(tiny_data.tokenizer),
            "mixture": [
                {"name": name, "path": str(prefix), "weight": weight}
                for weight, (name, prefix) in enumerate(tiny_data.prefixes.items(), 1)
            ],
        },
        "validation": {"every": 2, "sequences": 5},
        "checkpoint": {"every": 3, "keep": 3},
    }


def changed(mapping: Mapping, changes: Mapping) -> Mapping:
    """A copy with `section.key` values set; None as a section's value takes the section out."""
    new = copy.deepcopy(mapping)
    for place, value in changes.items():
        section, _, key = place.partition(".")
        if key:
            new.setdefault(section, {})[key] = value
        else:
            new[section] = value
    return new


@pytest.fixture
def make_config(tiny_mapping: Mapping) -> MakeConfig:
    """The tiny config with changes, given as {"section.key": value}."""
    return lambda changes=None: parse_config(changed(tiny_mapping, changes or {}))


@pytest.fixture
def config_file(tiny_mapping: Mapping, tmp_path: Path) -> ConfigFile:
    """Writes the tiny config with changes as a YAML file."""

    def write(changes: Mapping | None = None) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(changed(tiny_mapping, changes or {})))
        return path

    return write


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, signal.Signals], None]:
    """Makes this process receive a signal just after a step's row was written."""
    shown = Console.step

    def arrange(step: int, number: signal.Signals = signal.SIGTERM) -> None:
        def show(console: Console, row: Row) -> None:
            shown(console, row)
            if row["step"] == step:
                signal.raise_signal(number)

        monkeypatch.setattr(Console, "step", show)

    return arrange


def losses(directory: Path) -> list[tuple[Any, ...]]:
    """What must not depend on interruptions: every row of metrics.jsonl without its timings."""
    timings = {"step_seconds", "memory_bytes"}
    return [
        tuple((k, v) for k, v in row.items() if k not in timings and "per" not in k.split("_"))
        for row in read_metrics(directory / "metrics.jsonl")
    ]


def hash_of(tiny_data: TinyData) -> str:
    return Tokenizer(tiny_data.tokenizer).hash
