"""Imports point down only: the order of DESIGN §2, held by reading every import."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import megallama

PACKAGE = Path(megallama.__file__).parent

#: Top to bottom. A package imports from lines below its own; those of a line are siblings.
LAYERS = """
cli
check
train | plan
model | optim | data | checkpoint
parallel
autograd
kernels | dist
spec
config
files
errors
"""
LEVEL = {
    name.strip(): level
    for level, line in enumerate(LAYERS.split("\n"))
    for name in line.split("|")
    if name.strip()
}
#: Packages that import less than their place allows.
ONLY = {"plan": {"spec", "config"}}
#: Packages that import no torch.
LIGHT = ("config", "spec", "plan")


def imported(tree: ast.AST, package: list[str]) -> Iterator[str]:
    """Every module that a file of `package` imports, lazily too, by its full name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def faults(root: Path) -> list[str]:
    """What breaks the order in the package at `root`: unplaced names and imports that point up."""
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts == ("__init__",):
            continue  # the package itself: it has the version
        if parts[0] not in LEVEL:
            found.append(f"{path.relative_to(root)}: {parts[0]} has no place in the order")
            continue
        for name in imported(ast.parse(path.read_text()), ["megallama", *parts[:-1]]):
            top, _, rest = name.partition(".")
            other = rest.partition(".")[0]
            if top != "megallama" or other in ("", "__version__", parts[0]):
                continue
            below = LEVEL.get(other, -1) > LEVEL[parts[0]]
            if not below or other not in ONLY.get(parts[0], {other}):
                found.append(f"{path.relative_to(root)} imports {name}")
    return found


def test_imports_point_down():
    assert faults(PACKAGE) == []


PLANTED = {
    "import megallama.train.loop": "train.loop",
    "from megallama.model import llama": "model.llama",
    "from megallama import cli": "cli",
    "from ..checkpoint import store": "checkpoint.store",
    "from .. import data": "data",
    "def late():\n    from megallama.parallel.state import ParameterState": (
        "parallel.state.ParameterState"
    ),
    "importlib.import_module('megallama.optim.adamw')": "optim.adamw",
    "import megallama.nowhere": "nowhere",
}


@pytest.mark.parametrize("line, target", PLANTED.items())
def test_an_upward_import_is_found(tmp_path, line, target):
    (tmp_path / "autograd").mkdir()
    file = tmp_path / "autograd" / "planted.py"
    file.write_text("import torch\nfrom megallama.spec import saved\nfrom . import norm\n")
    assert faults(tmp_path) == []
    file.write_text(f"{file.read_text()}{line}\n")
    assert faults(tmp_path) == [f"autograd/planted.py imports megallama.{target}"]


def test_siblings_unplaced_packages_and_the_plan_s_own_rule(tmp_path):
    files = {
        "optim/a.py": "import megallama.data.dataset",
        "dist/a.py": "import megallama.kernels",
        "errors.py": "from megallama.files import sync",
        "strange/__init__.py": "",
        "helpers.py": "",
        "plan/a.py": "from megallama.spec import flops\nfrom megallama.dist import group",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert faults(tmp_path) == [
        "dist/a.py imports megallama.kernels",
        "errors.py imports megallama.files.sync",
        "helpers.py: helpers has no place in the order",
        "optim/a.py imports megallama.data.dataset",
        "plan/a.py imports megallama.dist.group",
        "strange/__init__.py: strange has no place in the order",
    ]


def loaded_by(modules: list[str]) -> set[str]:
    """The top-level modules that a fresh interpreter has after importing these."""
    script = (
        f"import sys, {', '.join(modules)}\nprint(*{{n.partition('.')[0] for n in sys.modules}})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def modules_of(package: str) -> list[str]:
    prefix = f"megallama.{package}."
    return [m.name for m in pkgutil.walk_packages([str(PACKAGE / package)], prefix)]


def test_config_spec_and_plan_import_no_torch():
    modules = [name for package in LIGHT for name in modules_of(package)]
    assert "megallama.spec.parameters" in modules
    assert "torch" not in loaded_by(modules)
    assert "torch" in loaded_by(["megallama.autograd.linear"]), "the check can fail"


def test_packages_import_nothing_heavy():
    packages = [
        module.name
        for module in pkgutil.walk_packages([str(PACKAGE)], "megallama.")
        if module.ispkg
    ]
    assert "megallama.autograd" in packages
    heavy = {"torch", "numpy", "matplotlib", "wandb", "sentencepiece", "pyarrow"}
    assert loaded_by(["megallama", *packages]) & heavy == set()
