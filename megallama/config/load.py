"""From a YAML file and `section.key=value` overrides to a `Config`, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megallama.config.checks import cross_check
from megallama.config.faults import Fault, at, explain
from megallama.config.schema import Config
from megallama.errors import ConfigError


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


def check_supported(config: Config, processes: int = 1) -> None:
    """Raises ConfigError where more is asked for than this version runs: one process."""
    sizes = config.parallel.model_dump(include={"tensor", "pipeline", "data"})
    asked = {f"parallel.{axis}": size for axis, size in sizes.items()} | {"--nproc": processes}
    faults = [
        Fault(at(key, size), "this version runs one process", "set it to 1")
        for key, size in asked.items()
        if size not in (1, None)
    ]
    _refuse(faults)


def _build(mapping: Mapping[str, Any], name: str, faults: list[Fault]) -> Config:
    sections = dict.fromkeys(Config.model_fields) | {str(k): v for k, v in mapping.items()}
    for section in Config.model_fields:
        if sections[section] is None:  # left out, or left empty in the file
            sections[section] = {}
    if isinstance(sections["run"], Mapping):
        sections["run"] = {"name": name, **sections["run"]}
    valid: dict[str, Any] = {}
    config = None
    try:
        config = Config.model_validate(sections, context=valid)
    except ValidationError as error:
        faults = faults + explain(error)
    _refuse([*faults, *cross_check(valid)])
    assert config is not None  # else there was a fault
    return config


def _refuse(faults: Sequence[Fault]) -> None:
    if faults:
        raise ConfigError("\n".join(map(str, faults)))


def _read(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it is not text"
        raise ConfigError(f"{path}{where}: not YAML ({problem}); correct the line") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: not a mapping of sections; begin with `model:`")
    return loaded


def _override(tree: dict[str, Any], text: str) -> list[Fault]:
    """Sets one `section.key=value` in the tree, or says why it cannot be set."""
    path, equals, value = text.partition("=")
    if not path or not equals:
        return [Fault(text, "is not section.key=value", "write for example train.steps=100")]
    keys = [int(key) if key.isdecimal() else key for key in path.split(".")]
    node: Any = tree
    try:
        for key in keys[:-1]:
            if isinstance(node, dict) and node.get(key) is None:
                node[key] = {}
            node = node[key]
        node[keys[-1]] = yaml.safe_load(value)
    except yaml.YAMLError:
        return [Fault(text, "its value is not YAML", "quote it, or close its brackets")]
    except (TypeError, IndexError):
        return [Fault(text, "names no place in the config", "check the path to the key")]
    return []
