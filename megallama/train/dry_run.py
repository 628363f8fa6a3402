"""`train --dry-run`: everything a run needs, checked and shown, without training."""

from __future__ import annotations

from dataclasses import replace

import torch

from megallama.config.schema import Config
from megallama.data.tokenizer import Tokenizer
from megallama.errors import EXIT_DONE
from megallama.spec.grid import Grid, make_grid
from megallama.spec.memory import held_bytes
from megallama.spec.parameters import parameter_table
from megallama.spec.stages import chunks_of, owners_of
from megallama.spec.workspaces import Device
from megallama.train.build import build_dataset
from megallama.train.device import choose_device
from megallama.train.memory import find_room, ledger_lines, verdict
from megallama.train.process import Process

#: More ranks than these are not listed.
MOST_RANKS = 64


def dry_run(config: Config, processes: int = 1) -> int:
    """Validate the config and its data, show the first batch, and the memory at a step's peak.

    Raises:
        UserError: as training would.
    """
    grid = make_grid(config, processes)
    device = choose_device(config)
    dataset = build_dataset(config)
    batch = dataset.batch(0, config.train.global_batch)
    tokens = config.train.total_steps * batch.tokens_NS.size
    print(f"run: {config.train.total_steps:,} steps, {tokens:,} tokens, on {device}")
    for name, epochs in dataset.order.epochs(tokens // config.train.sequence_length).items():
        print(f"source {name}: {epochs:.2f} epochs")
    if config.data.tokenizer:
        text = Tokenizer(config.data.tokenizer).decode(batch.tokens_NS[0].tolist())
        print(f"first sample: {text[:200]!r}")
    parameters = sum(parameter.numel for parameter in parameter_table(config.model))
    print(f"parameters: {parameters:,}")
    _show_layout(config, grid)
    _show_memory(config, grid, device)
    return EXIT_DONE


def _show_memory(config: Config, grid: Grid, device: torch.device) -> None:
    """The ledger, and whether it fits where all ranks are local workers, who share the threads."""
    room = find_room(device, Process(0, grid.size, 0, grid.size, None, None))
    if room:
        room = replace(room, threads=max(1, room.threads // grid.size))
    if grid.pipeline > 1:
        print("memory at its peak, on the rank that holds the most:")
    sizes = held_bytes(config, grid, room.kind if room else Device(device.type))
    print("\n".join(ledger_lines(sizes)))
    if room:
        print(verdict(config, grid, room))


def _show_layout(config: Config, grid: Grid) -> None:
    """Where each rank stands, where they are few, and in a pipeline the layers of each chunk."""
    if 1 < grid.size <= MOST_RANKS:
        print(grid)
    if grid.pipeline > 1:
        print(f"schedule: {config.parallel.schedule}")
        for chunk, rank in zip(chunks_of(config, grid), owners_of(config, grid), strict=True):
            first, last = chunk.layers[0], chunk.layers[-1]
            layers = f"layer {first}" if first == last else f"layers {first} to {last}"
            ends = (", embedding" if chunk.embedding else "") + (", head" if chunk.head else "")
            print(f"chunk {chunk.index}, on pp {rank}: {layers}{ends}")
