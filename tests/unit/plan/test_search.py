"""The search against a prediction of every layout; its bounds; and what it leaves out."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from megallama.config.load import config_to_yaml, load_config, parse_config
from megallama.config.schema import Config
from megallama.errors import ConfigError
from megallama.plan.bounds import least_bytes, least_seconds, roughly_least_seconds
from megallama.plan.hardware import Hardware, load_hardware
from megallama.plan.layouts import Layout, layouts
from megallama.plan.ledger import Ledger, ledger
from megallama.plan.predict import Prediction, predict
from megallama.plan.search import LESS, LONGER, RANKED, Found, search
from megallama.spec.grid import make_grid

DEVICES = 8
#: So that the leanest of the layouts fit and the richest do not.
CAPACITY = 1_300_000_000


def small_config() -> Config:
    return parse_config(
        {
            "model": {"d_model": 512, "layers": 8, "heads": 4, "ffn": 1408, "vocab": 32000},
            "train": {"steps": 10, "sequence_length": 1024, "global_batch": 8},
            "parallel": {"overlap": "backward"},
            "optimizer": {"lr": 1e-3},
        }
    )


def small_machine(capacity: int = CAPACITY) -> Hardware:
    """Four devices a node, each with little memory, of which a CPU's libraries take the least."""
    machine = load_hardware("a100-80gb")
    memory = machine.memory.model_copy(update={"capacity": capacity})
    return machine.model_copy(update={"memory": memory, "ranks": 4, "device": "cpu"})


@dataclass(frozen=True)
class Priced:
    layout: Layout
    prediction: Prediction
    memory: Ledger


FIXED = ("parallel.overlap",)


@pytest.fixture(scope="module")
def every() -> list[Priced]:
    """All layouts, each predicted and its memory counted."""
    config, machine = small_config(), small_machine()
    return [
        Priced(
            one,
            predict(one.config, machine, DEVICES),
            ledger(one.config, make_grid(one.config, DEVICES), machine),
        )
        for one in layouts(config, DEVICES, machine.ranks, FIXED)
    ]


@pytest.fixture(scope="module")
def found() -> Found:
    return search(small_config(), small_machine(), DEVICES, FIXED)


@pytest.mark.parametrize("capacity", [CAPACITY, 10 * CAPACITY, CAPACITY * 9 // 10])
def test_the_search_ranks_as_a_prediction_of_all(every: list[Priced], capacity: int) -> None:
    expected: list[Layout] = []
    smallest = float("inf")
    fitting = [one for one in every if one.memory.largest.needed <= capacity]
    assert len(fitting) > RANKED
    fitting.sort(key=lambda one: one.prediction.step_seconds)  # stable, as the search's ties are
    slowest = LONGER * fitting[0].prediction.step_seconds
    for one in fitting:
        needed = one.memory.largest.needed
        small = needed <= LESS * smallest and one.prediction.step_seconds <= slowest
        if len(expected) < RANKED or small:
            expected.append(one.layout)
            smallest = min(smallest, needed)
    found = search(small_config(), small_machine(capacity), DEVICES, FIXED)
    assert [one.layout for one in found.ranked] == expected
    assert found.tried == len(every)
    assert found.priced < len(every)


def test_bounds_hold(every: list[Priced]) -> None:
    machine = small_machine()
    for one in every:
        seconds = one.prediction.step_seconds
        assert roughly_least_seconds(one.layout, machine) <= seconds * (1 + 1e-9)
        assert least_seconds(one.layout, machine) <= seconds * (1 + 1e-9)
        least = least_bytes(one.layout)
        assert least.bytes <= one.memory.stages[least.rank].held


def test_every_axis_is_tried(every: list[Priced]) -> None:
    tried = [one.layout for one in every]
    assert {one.tensor for one in tried} == {1, 2, 4}  # a node
    assert {one.pipeline for one in tried} == {1, 2, 4, 8}
    assert len({one.schedule for one in tried}) == 7  # all but gpipe
    assert len({one.policy for one in tried}) == 5
    assert {one.virtual_stages for one in tried} == {1, 2, 4}
    assert {one.micro_batch for one in tried} == {1, 2, 4, 8}
    assert all(one.tensor * one.pipeline * one.data == DEVICES for one in tried)


def test_layouts_are_configs_that_load(every: list[Priced]) -> None:
    for one in every[::7]:
        tree = one.layout.config.model_dump(mode="json")
        assert parse_config(tree) == one.layout.config


def test_the_best_config_goes_through_a_file(found: Found, tmp_path) -> None:
    path = tmp_path / "best.yaml"
    path.write_text(config_to_yaml(found.best.layout.config))
    assert load_config(path) == found.best.layout.config


def test_the_front_needs_less_and_less(found: Found) -> None:
    seconds = [one.prediction.step_seconds for one in found.ranked]
    assert seconds == sorted(seconds)
    needed = [one.stage.needed for one in found.front]
    assert needed == sorted(needed, reverse=True)
    assert found.front[0] is found.best
    for one in found.ranked:
        faster = [
            f for f in found.front if f.prediction.step_seconds <= one.prediction.step_seconds
        ]
        assert min(f.stage.needed for f in faster) <= one.stage.needed


@pytest.mark.parametrize(
    "overrides, fixed",
    [
        ({"pipeline": 2, "schedule": "zb-h1"}, {"parallel.pipeline", "parallel.schedule"}),
        ({"tensor": 4, "overlap": "none"}, {"parallel.tensor", "parallel.overlap"}),
        ({"data": 2}, {"parallel.data"}),
    ],
)
def test_fixed_keys_keep_their_values(overrides: dict[str, object], fixed: set[str]) -> None:
    tree = small_config().model_dump(mode="json")
    tree["parallel"] |= overrides
    config = parse_config(tree)
    found = list(layouts(config, DEVICES, 4, fixed))
    assert found
    for one in found:
        dumped = one.config.parallel.model_dump()
        assert {key: dumped[key] for key in overrides} == overrides


def test_a_list_of_stage_layers_stays_where_it_fits() -> None:
    tree = small_config().model_dump(mode="json")
    tree["parallel"] |= {"pipeline": 2, "stage_layers": [3, 5]}
    splits = {
        (one.pipeline * one.virtual_stages, one.config.parallel.stage_layers)
        for one in layouts(parse_config(tree), DEVICES, 4)
    }
    assert (2, (3, 5)) in splits
    assert {split for chunks, split in splits if chunks != 2} == {"cost"}


def test_nothing_that_divides_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"^11 devices: no layout divides this run") as caught:
        search(small_config(), small_machine(), 11)
    assert "\n" not in str(caught.value)


def test_nothing_that_fits_is_one_line() -> None:
    machine = small_machine()
    memory = machine.memory.model_copy(update={"capacity": 1 << 20})
    with pytest.raises(ConfigError, match=r"^8 devices of 0\.0 GiB: none of") as caught:
        search(small_config(), machine.model_copy(update={"memory": memory}), DEVICES)
    assert "\n" not in str(caught.value)
