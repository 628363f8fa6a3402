"""A plan in the terminal: the memory, the predicted step, the table of a search, advice."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from megallama.cli.plan_figures import CONGESTED, GIB, Advised, Planned, amount
from megallama.config.schema import Config
from megallama.plan.ledger import LASTING, Stage
from megallama.plan.search import Found

#: What a group of `Prediction.exposed` is.
WHY = {
    "tensor": "collectives of tensor ranks that no kernel hides, and kernels beside them slower",
    "pipeline": "messages between stages that arrive late",
    "bubble": "stages that wait for each other",
    "data": "gradients and weights of data ranks, beyond the passes that hide them",
    "step_sum": "the sum over all ranks before the update",
    "optimizer": "AdamW",
}
MOST_STAGES = 16  # a row each; of more, the first, the last and the largest


def show(console: Console, plan: Planned) -> None:
    """The layout, its memory and its predicted step."""
    hardware, config = plan.hardware, plan.config
    name = config.run.name
    console.print(f"[bold]{name}[/] on {plan.grid.size:,} x {hardware.name}: every figure of time "
                  "is predicted, none measured")  # fmt: skip
    console.print(layout_words(config))
    if len(plan.memory.stages) > 1:
        _show_stages(console, plan)
    _show_items(console, plan)
    _show_step(console, plan)


def layout_words(config: Config) -> str:
    """One line, in the order of the grid."""
    parallel, train = config.parallel, config.train
    count = train.global_batch // (train.micro_batch * (parallel.data or 1))
    parts = [f"tensor {parallel.tensor} x data {parallel.data} x pipeline {parallel.pipeline}"]
    chunks = parallel.chunks_per_rank
    parts.append(parallel.schedule + (f" x {chunks} chunks" if chunks > 1 else ""))
    parts.append(f"{count} micro-batch{'es' if count > 1 else ''} of {train.micro_batch}")
    return ", ".join([*parts, f"{train.saved_activations}, overlap {parallel.overlap}"])


def _show_stages(console: Console, plan: Planned) -> None:
    table = _table("stage", "layers", "state", "the rest", "sum", "needed")
    stages, largest = plan.memory.stages, plan.memory.largest
    shown = stages if len(stages) <= MOST_STAGES else (stages[0], largest, stages[-1])
    for stage in {one.rank: one for one in sorted(shown, key=lambda one: one.rank)}.values():
        state = sum(size for name, size in stage.items.items() if name in LASTING)
        sizes = state, stage.held - state, stage.held, stage.needed
        mark = " *" if stage is largest else ""
        table.add_row(f"{stage.rank}{mark}", str(stage.layers), *map(_gib, sizes))
    console.print("Memory of a rank by stage, GiB; * the one that needs most")
    console.print(table)


def _show_items(console: Console, plan: Planned) -> None:
    """The ledger of the largest rank, and the verdict."""
    stage = plan.memory.largest
    which = f" (stage {stage.rank})" if len(plan.memory.stages) > 1 else ""
    table = _table(f"memory of the largest rank{which}", "GiB")
    for name, size in stage.items.items():
        table.add_row(name, _gib(size))
    table.add_section()
    table.add_row("sum", _gib(stage.held))
    table.add_row("allocator slack (assumed)", _gib(stage.slack))
    table.add_row("driver and libraries (assumed)", _gib(stage.libraries))
    console.print(table)
    console.print(verdict(plan, stage))


def verdict(plan: Planned, stage: Stage) -> str:
    """One line: it fits, or it does not and what would."""
    room = f"{_gib(stage.needed)} GiB of {_gib(plan.memory.capacity)}"
    if plan.memory.fits:
        return f"fits: {room}"
    way_out = plan.change or "no policy, micro_batch or more ranks would do; take a smaller model"
    return f"does not fit: {room}; {way_out}"


def _show_step(console: Console, plan: Planned) -> None:
    step = plan.prediction
    table = _table("predicted step", "seconds", "share", "")
    rows = [("kernels", step.compute_seconds, "of the stage that has most of them")]
    rows += [(name, seconds, WHY[name]) for name, seconds in step.exposed.items()]
    for name, seconds, why in rows:
        share = f"{seconds / step.step_seconds:.1%}"
        table.add_row(name, f"{seconds:.3f}", share, why)
    table.add_section()
    table.add_row("step", f"{step.step_seconds:.3f}", "", "")
    table.columns[-1].justify = "left"
    console.print(table)
    mfu = "unknown: no peak" if step.mfu is None else f"{step.mfu:.1%} (6N: {step.mfu_6n:.1%})"
    console.print(f"predicted tokens/s/GPU  {step.tokens_per_second_per_gpu:,.1f}")
    console.print(f"predicted MFU           {mfu}")
    if plan.congested is not None:
        rate = plan.congested.tokens_per_second_per_gpu
        less = 1 - rate / step.tokens_per_second_per_gpu
        console.print(
            f"with {CONGESTED:.0%} of the network's bandwidth: {rate:,.1f} tokens/s/GPU "
            f"({less:.1%} less)"
        )
    console.print(
        f"predicted for {amount(plan.tokens)} tokens: {plan.days:,.1f} days, "
        f"{plan.gpu_hours:,.0f} GPU-hours"
    )


def show_search(console: Console, found: Found) -> None:
    """The fastest layouts, and those that need less memory than every faster one."""
    console.print(
        f"{found.tried:,} layouts, {found.priced:,} predicted; * less memory than every faster one"
    )
    table = _table(
        "tokens/s/GPU", "MFU", "GiB", "tp·pp·dp", "schedule", "batch", "saved", "overlap"
    )
    for column in table.columns[4:]:
        column.justify, column.overflow = "left", "fold"
    front = set(map(id, found.front))
    for one in found.ranked:
        layout, step = one.layout, one.prediction
        chunks = f" x{layout.virtual_stages}" if layout.virtual_stages > 1 else ""
        table.add_row(
            f"{step.tokens_per_second_per_gpu:,.1f}",
            "" if step.mfu is None else f"{step.mfu:.1%}",
            _gib(one.stage.needed) + (" *" if id(one) in front else "  "),
            f"{layout.tensor}·{layout.pipeline}·{layout.data}",
            layout.schedule + chunks, str(layout.micro_batch), layout.policy, layout.overlap,
        )  # fmt: skip
    console.print(table)


def show_advice(console: Console, advice: Advised | None) -> None:
    """Model sizes and tokens by the law."""
    if advice is None:
        return
    law = advice.law
    console.print(
        f"Advice: L = {law.e:g} + {law.a:g}/N^{law.alpha:g} + {law.b:g}/D^{law.beta:g} "
        f"({law.source}), in nats of its own text and tokenizer; GPU-hours at this run's predicted "
        "FLOP/s; FLOPs are 6·N·D for training and 2·N·T for serving T tokens, and both are paid"
    )
    table = _table("", "parameters", "tokens", "tokens each", "loss", "hours to train",
                   "all FLOPs")  # fmt: skip
    table.columns[0].justify = "left"
    for words, model in advice.rows:
        table.add_row(
            words, amount(model.parameters), amount(model.tokens),
            f"{model.tokens / model.parameters:,.0f}", f"{model.loss:.3f}",
            f"{advice.gpu_hours(model):,.0f}", f"{advice.flops(model):.3g}",
        )  # fmt: skip
    console.print(table)


def _table(*titles: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, title in enumerate(titles):
        table.add_column(title, justify="right" if place else "left")
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}"
