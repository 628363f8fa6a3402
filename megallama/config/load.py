"""From a YAML file and `section.key=value` overrides to a `Config`, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megallama.config.checks import cross_check
from megallama.config.faults import Fault, explain, is_secret, shorten
from megallama.config.schema import Config
from megallama.errors import ConfigError

# The last two are of the values: a date such as 2026-13-45, brackets 5,000 deep.
_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)


class _Loader(yaml.SafeLoader):
    """YAML that means what it shows: no key twice, and `017` and `1:30`, which YAML 1.1 reads as
    octal and as base 60, are text, which a number's key refuses."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    problem = f"{key.value} is set on line {lines[key.value]} too"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                lines[key.value] = key.start_mark.line + 1
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> Any:
        if ":" in node.value or re.match(r"[-+]?0[0-9_]", node.value):
            return str(node.value)
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> Any:
        return str(node.value) if ":" in node.value else super().construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file, with `section.key=value` overrides applied in order.

    Raises ConfigError with one line per fault, all faults at once.
    """
    mapping = _read(Path(path))
    faults = [fault for text in overrides for fault in _override(mapping, text)]
    return _build(mapping, Path(path).stem, faults)


def parse_config(mapping: Mapping[str, Any], name: str = "run") -> Config:
    """The config in a mapping of sections; `name` is the default of run.name.

    Raises ConfigError with one line per fault, all faults at once.
    """
    return _build(mapping, name, [])


def config_to_yaml(config: Config) -> str:
    """YAML with every key of the config, which loads to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _build(mapping: Mapping[str, Any], name: str, faults: list[Fault]) -> Config:
    sections = dict.fromkeys(Config.model_fields) | {str(k): v for k, v in mapping.items()}
    for section in Config.model_fields:
        if sections[section] is None:  # left out, or left empty in the file
            sections[section] = {}
    run: Any = sections["run"]
    unnamed = isinstance(run, Mapping) and "name" not in run
    if unnamed:
        sections["run"] = {"name": name, **run}
    valid: dict[str, Any] = {}
    config = None
    try:
        config = Config.model_validate(sections, context=valid)
    except ValidationError as error:
        faults = faults + [_of_default(f) if unnamed else f for f in explain(error)]
    _refuse([*faults, *cross_check(valid)])
    assert config is not None  # else there was a fault
    return config


def _of_default(fault: Fault) -> Fault:
    """The fault of a run's name that the user never wrote says so."""
    if not fault.subject.startswith("run.name="):
        return fault
    wrong = f"the default, from the file's name, {fault.wrong}"
    return Fault(fault.subject, wrong, f"set run.name: {fault.remedy}")


def _refuse(faults: Sequence[Fault]) -> None:
    if faults:
        raise ConfigError("\n".join(map(str, faults)))


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises ConfigError, one line, where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a YAML file") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16 too
        raise ConfigError(f"{path}: not UTF-8 text; save it as UTF-8")
    try:
        return _parse(text)
    except _NOT_YAML as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not YAML ({_problem(error)}); correct it") from None


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def _problem(error: Exception) -> str:
    if isinstance(error, yaml.YAMLError):
        return getattr(error, "problem", None) or "it is not text"
    deep = isinstance(error, RecursionError)
    return "nested too deep" if deep else "a date or number out of range"


def _read(path: Path) -> dict[str, Any]:
    loaded = read_yaml(path)
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: not a mapping of sections; begin with `model:`")
    return loaded


def _override(tree: dict[str, Any], text: str) -> list[Fault]:
    """Sets one `section.key=value` in the tree, or says why it cannot be set."""
    path, equals, value = text.partition("=")
    if not path or not equals:
        return [
            Fault(shorten(text), "is not section.key=value", "write for example train.steps=100")
        ]
    keys = [int(key) if key.isdecimal() else key for key in path.split(".")]
    node: Any = tree
    try:
        for key in keys[:-1]:
            if isinstance(node, dict) and node.get(key) is None:
                node[key] = {}
            node = node[key]
        node[keys[-1]] = _parse(value)
    except _NOT_YAML as error:
        wrong = f"its value is not YAML ({_problem(error)})"
        return [Fault(_shown(path, value), wrong, "quote it, or close its brackets")]
    except (TypeError, IndexError):
        wrong = "names no place in the config"
        return [Fault(_shown(path, value), wrong, "check the path to the key")]
    return []


def _shown(key: str, value: str) -> str:
    """An override as it was given, but for a secret."""
    return f"{key}=(not shown)" if is_secret(key, value) else shorten(f"{key}={value}")
