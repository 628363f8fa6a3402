"""Machines in YAML files."""

from __future__ import annotations

import pytest
import yaml

from megallama.errors import ConfigError
from megallama.plan.hardware import FOLDER, known_names, load_hardware


def test_the_machines_of_the_package():
    assert known_names() == ["a100-80gb", "cpu", "h100", "h200"]
    for name in known_names():
        assert load_hardware(name).name == name


def test_every_constant_has_a_source_or_says_that_it_was_chosen():
    """Each line with a number of the A100's and the CPU's is explained there or above it."""
    for name in ("a100-80gb", "cpu"):
        explained = False
        for line in (FOLDER / f"{name}.yaml").read_text().splitlines():
            indented = line.startswith("  ")
            explained = "#" in line or (explained and indented)
            has_number = any(character.isdigit() for character in line.partition(":")[2])
            assert explained or not has_number or line.startswith(("name", "ranks")), line


def test_an_unknown_machine_is_one_line():
    with pytest.raises(ConfigError) as caught:
        load_hardware("b200")
    known = "a100-80gb, cpu, h100, h200, or the path of a .yaml file"
    assert str(caught.value) == f"machine 'b200': is not known; use one of {known}"


def test_a_file_of_a_user(tmp_path):
    path = tmp_path / "mine.yaml"
    tree = load_hardware("h100").model_dump()
    path.write_text(yaml.safe_dump(tree))
    assert load_hardware(str(path)).model_dump() == tree


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gemms": 1}, "gemms: is not a constant of a machine; remove it"),
        ({"memory": {"bandwidth": 1.0}}, "memory.capacity: is missing; give its value"),
        (
            {"contention": {"compute": -1}},
            "contention.compute: input should be greater than or equal to 0",
        ),
    ],
)
def test_a_fault_in_a_file_names_the_file_and_the_field(change, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(load_hardware("h100").model_dump() | change))
    with pytest.raises(ConfigError) as caught:
        load_hardware(str(path))
    assert str(caught.value) == f"{path}: {message}"


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_hardware(str(tmp_path / "none.yaml"))
