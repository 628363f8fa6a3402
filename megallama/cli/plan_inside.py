"""Two layers of a predicted forward and backward, kernel by kernel, as two axes of a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from megallama.cli.plan_figures import Planned
from megallama.plan.spans import Span

LAYERS = 2
#: Tops of the two lanes in axes of height 1, and their height.
KERNELS, COLLECTIVES, HEIGHT = 0.08, 0.56, 0.36


def first_passes(plan: Planned, found: Sequence[Span]) -> list[tuple[Span, int]]:
    """Pipeline rank 0's first forward and first backward, of those that it runs alone, and the
    layers of the chunk of each."""
    own = [span for span in found if span.rank == 0 and span.lane == "compute"]
    layers = len(plan.memory.stages[0].chunks[0].layers)
    firsts = (next((s for s in own if s.kind in kinds), None) for kinds in ("F", ("B", "BW")))
    return [(span, layers) for span in firsts if span is not None and layers > LAYERS]


def draw_inside(axes: Any, one: Span, layers: int, found: Sequence[Span]) -> None:
    """Two layers from the middle of a pass: kernels over the tensor ranks' collectives."""
    from megallama.train.timeline import GROUPS, IDLE, PASSES

    length = (one.end - one.start) / layers
    begin = one.start + layers // 2 * length
    end = begin + LAYERS * length
    colours = {"kernels": PASSES[one.kind][0], "tensor": GROUPS["tensor"]}
    boxes: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for span in found:
        inside = span.rank == 0 and span.start < end and span.end > begin
        if inside and span.lane in colours and one.start <= span.start <= span.end <= one.end:
            left, right = max(span.start, begin) - begin, min(span.end, end) - begin
            boxes[span.lane].append((1e3 * left, 1e3 * (right - left)))
    for lane, top in (("kernels", KERNELS), ("tensor", COLLECTIVES)):
        axes.broken_barh([(0, 1e3 * (end - begin))], (top, HEIGHT), facecolor=IDLE)
        axes.broken_barh(boxes[lane], (top, HEIGHT), facecolor=colours[lane], edgecolor="white",
                         lw=0.6, zorder=2)  # fmt: skip
    axes.set_xlim(0, 1e3 * (end - begin))
    axes.set_ylim(1, 0)
    axes.set_yticks([KERNELS + HEIGHT / 2, COLLECTIVES + HEIGHT / 2], ["kernels", "tensor"])
    axes.tick_params(axis="y", labelsize=9)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_title(f"{LAYERS} layers of {one.name}", loc="left", fontsize=10.5)
    axes.set_xlabel("ms")
