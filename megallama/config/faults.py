"""A fault in a config as one line: the key, its value, what is wrong and the way out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple, get_args

import yaml
from pydantic import BaseModel, ValidationError

from megallama.config.aliases import find_alias
from megallama.config.schema import Config

_SHOWN = 60  # characters of a value
_SECRET = re.compile(r"(key|token|secret|passw(or)?d|credentials?|auth)$", re.IGNORECASE)

# What is wrong, and the remedy, for each kind of error that the schema can give.
_WORDING = {
    "int_type": ("is not a whole number", "write digits alone, such as 4"),
    "float_type": ("is not a number", "write a number, such as 0.1 or 3.0e-4"),
    "finite_number": ("is not finite", "write an ordinary number, such as 0.1 or 3.0e-4"),
    "bool_type": ("is not a switch", "write true or false"),
    "string_type": ("is not text", "write text, in quotes where YAML reads it as something else"),
    "path_type": ("is not a path", "write text, in quotes where YAML reads it as something else"),
    "string_pattern_mismatch": (
        "is not a name",
        "use letters, digits, dots, dashes and underscores, a letter or digit first",
    ),
    "string_too_long": ("is too long", "give at most {max_length} characters"),
    "split": ("is not a split of layers", "use 'cost', 'even' or a list such as [3, 5]"),
    "address": ("is an address", "give the path of a file that this machine has"),
    "nul": ("holds a NUL character", "remove it"),
    "literal_error": ("is not a choice", "use {expected}"),
    "greater_than": ("is too small", "give a value above {gt:g}"),
    "greater_than_equal": ("is too small", "give {ge:g} or more"),
    "less_than": ("is too large", "give a value below {lt:g}"),
    "tuple_type": ("is not a list", "write one as [a, b]"),
    "too_short": ("has too few items", "give at least {min_length}"),
    "too_long": ("has too many items", "give at most {max_length}"),
    "model_type": ("is not a mapping", "write its keys as `key: value`"),
}
_UNKNOWN = ("extra_forbidden", "invalid_key")
_FOLLOWS = "default_factory_not_called"  # a default that follows from a value at fault


class Fault(NamedTuple):
    subject: str
    """The key, or key=value."""
    wrong: str
    remedy: str

    def __str__(self) -> str:
        return " ".join(f"{self.subject}: {self.wrong}; {self.remedy}".split())


def at(key: str, value: object) -> str:
    """`key=value`, the value as YAML writes it, on one line and cut where it is long.

    A value that may be a secret is not shown: messages go to logs that others read.
    """
    if is_secret(key, value):
        return f"{key}=(not shown)"
    try:
        dumped = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True)
    except yaml.YAMLError:  # not a YAML type: the caller made the mapping in Python
        dumped = str(value)
    except (ValueError, RecursionError):  # an endless integer, brackets too deep
        dumped = "..."
    dumped = dumped.removesuffix("...\n")
    return f"{key}={shorten(dumped)}"


def is_secret(key: str, value: object) -> bool:
    """Whether a key is one that secrets have, here or within its value, or a value an address."""
    left: list[tuple[str, object]] = [(key, value)]
    seen: set[int] = set()  # YAML's aliases make of a few lines a tree without end
    while left:
        name, inner = left.pop()
        if _SECRET.search(name) or (isinstance(inner, str) and "://" in inner):
            return True
        if isinstance(inner, Mapping | list | tuple) and id(inner) not in seen:
            seen.add(id(inner))
            pairs = inner.items() if isinstance(inner, Mapping) else ((name, i) for i in inner)
            left += ((str(name), item) for name, item in pairs)
    return False


def shorten(text: str) -> str:
    """`text` on one line, cut where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def explain(error: ValidationError) -> list[Fault]:
    """Every error of the schema as a fault, without those that only follow from another."""
    details = error.errors(include_url=False)
    unknown = [
        pair
        for detail in details
        if detail["type"] in _UNKNOWN
        for pair in _unknown(detail["loc"], detail["input"])
    ]
    meant = {key for _, key in unknown}
    no_preset = any(detail["loc"] == ("model", "preset") for detail in details)
    faults = []
    for detail in details:
        loc = detail["loc"]
        if detail["type"] == "missing":
            if _dotted(loc) not in meant and not (no_preset and loc[0] == "model"):
                faults.append(_missing(loc))
        elif detail["type"] not in _UNKNOWN and detail["type"] != _FOLLOWS:
            wrong, remedy = _WORDING.get(detail["type"], (detail["msg"], "correct it"))
            remedy = remedy.format(**detail.get("ctx", {}))
            faults.append(Fault(at(_dotted(loc), detail["input"]), wrong, remedy))
    return faults + [fault for fault, _ in unknown]


def _dotted(loc: tuple[int | str, ...]) -> str:
    return ".".join(map(str, loc))


def _missing(loc: tuple[int | str, ...]) -> Fault:
    field = _keys(loc[:-1]).get(str(loc[-1]))
    about = f" ({field.split('. ')[0].rstrip('.')})" if field else ""
    return Fault(_dotted(loc), "is missing", f"set it{about}")


def _keys(loc: tuple[int | str, ...]) -> dict[str, str]:
    """The keys that may stand at a place in the config, each with its description."""
    model: type[BaseModel] = Config
    for name in loc:
        if isinstance(name, str):
            if name not in model.model_fields:
                return {}
            annotation = model.model_fields[name].annotation
            inner = [annotation, *get_args(annotation)]
            models = [t for t in inner if isinstance(t, type) and issubclass(t, BaseModel)]
            if not models:
                return {}
            model = models[0]
    return {name: field.description or "" for name, field in model.model_fields.items()}


def _unknown(loc: tuple[int | str, ...], value: Any) -> Iterator[tuple[Fault, str]]:
    """A fault for an unknown key, or for each key of an unknown section; with the key meant."""
    known = _known(str(loc[-1]))
    if len(loc) == 1 and isinstance(value, Mapping) and value and not known:
        for key, inner in value.items():
            yield from _unknown((*loc, str(key)), inner)
        return
    meant, remedy = known or _nearest(loc)
    subject = at(_dotted(loc), value) if isinstance(loc[-1], str) else _dotted(loc)
    yield Fault(subject, "is not a key here", remedy), meant


def _known(key: str) -> tuple[str, str] | None:
    """What a key of another section or another system is here ("" for nothing): key, remedy."""
    homes = [f"{section}.{key}" for section in Config.model_fields if key in _keys((section,))]
    if homes:
        return homes[0], f"use {' or '.join(homes)}"
    if alias := find_alias(key):
        note = f" ({alias.note})" if alias.here and alias.note else alias.note
        return alias.here, f"use {alias.here}{note}" if alias.here else note
    return None


def _nearest(loc: tuple[int | str, ...]) -> tuple[str, str]:
    """What a key that nobody knows may be a misspelling of ("" for nothing): key, remedy."""
    *place, key = map(str, loc)
    siblings = {name: ".".join([*place, name]) for name in _keys(loc[:-1])}
    sections = Config.model_fields
    everywhere = {name: f"{section}.{name}" for section in sections for name in _keys((section,))}
    for candidates in (siblings, everywhere):
        if near := get_close_matches(key, candidates, n=1):
            return candidates[near[0]], f"use {candidates[near[0]]}"
    if place and siblings:
        return "", f"remove it, or use one of {', '.join(siblings)}"
    return "", f"remove it; the sections are {', '.join(sections)}"
