"""The ledger by stage against `spec.memory`, its verdict at the byte, and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from megallama.config.load import load_config, parse_config
from megallama.config.schema import Config
from megallama.plan.hardware import Hardware, load_hardware
from megallama.plan.ledger import Ledger, ledger, way_out
from megallama.spec.grid import Grid, Place, make_grid
from megallama.spec.groups import run_schedule
from megallama.spec.memory import held_bytes, rank_bytes
from megallama.spec.workspaces import Device

ROOT = Path(__file__).parents[3]
CONFIGS, SCRIPTS = ROOT / "configs", sorted((ROOT / "launch").glob("*.sbatch"))


def a_run(**parallel: object) -> tuple[Config, Grid]:
    config = load_config(CONFIGS / "llama-7b.yaml")
    tree = config.model_dump(mode="json")
    tree["parallel"] |= {"tensor": 2, "pipeline": 4, **parallel}
    tree["train"]["global_batch"] = 32
    config = parse_config(tree)
    return config, make_grid(config, 16)


def machine(capacity: int) -> Hardware:
    one = load_hardware("a100-80gb")
    return one.model_copy(update={"memory": one.memory.model_copy(update={"capacity": capacity})})


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb-v"])
def test_stages_are_spec_s_ranks(schedule: str) -> None:
    config, grid = a_run(schedule=schedule)
    found = ledger(config, grid, load_hardware("a100-80gb"))
    device, lists = Device("cuda"), run_schedule(config, grid).actions
    for stage, actions in zip(found.stages, lists, strict=True):
        rank = grid.group("pipeline", 0)[stage.rank]
        assert stage.items == rank_bytes(config, Place(grid, rank), actions, device)
    assert max(s.held for s in found.stages) == sum(held_bytes(config, grid, device).values())
    assert sorted(i for s in found.stages for c in s.chunks for i in c.layers) == [*range(32)]
    assert found.stages[0].chunks[0].embedding
    assert sum(stage.layers for stage in found.stages) == 32


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_preset_fits_where_its_script_runs_it(script: Path) -> None:
    """On A100-80GBs, with what the allocator's share may be wrong by to spare."""
    config = load_config(CONFIGS / f"{script.stem}.yaml")
    gpus = 8 * int(script.read_text().partition(" --nodes ")[2].split()[0])
    found = ledger(config, make_grid(config, gpus), load_hardware("a100-80gb"))
    assert found.largest.needed + (8 << 30) < found.capacity


def test_slack_is_of_what_comes_and_goes() -> None:
    config, grid = a_run()
    for stage in ledger(config, grid, load_hardware("a100-80gb")).stages:
        lasting = sum(
            stage.items.get(name, 0)
            for name in ("weights", "masters", "gradients", "moments", "rotations", "logits")
        )
        assert stage.slack == round(0.05 * (stage.held - lasting))
        assert stage.needed == stage.held + stage.slack + (2 << 30)
    on_cpu = ledger(config, grid, load_hardware("cpu")).stages[0]
    assert on_cpu.libraries == 256 << 20


def test_it_fits_to_the_byte() -> None:
    config, grid = a_run()
    needed = ledger(config, grid, machine(1)).largest.needed
    assert ledger(config, grid, machine(needed)).fits
    assert not ledger(config, grid, machine(needed - 1)).fits


def test_the_way_out_fits() -> None:
    config, grid = a_run()
    small = machine(ledger(config, grid, machine(1)).largest.needed * 9 // 10)
    found = way_out(config, grid, small)
    assert found is not None
    change, held = found
    after: Ledger = ledger(change.config, change.grid, small)
    assert after.fits
    assert max(stage.held for stage in after.stages) == held
    assert way_out(config, grid, machine(1)) is None
