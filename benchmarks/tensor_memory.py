"""What a step's tensors occupy, counted from the allocator's own events.

PyTorch's profiler reports every allocation and release of tensor memory with its address, on a CPU
as on a GPU. Counted from a process's start on, their running sum is what is allocated at any time.
Resident memory, for comparison, has the interpreter, the libraries and freed pages in it.

What a kernel's library takes from the system by itself is not counted, for anybody.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

MEASURED = "the measured step"


class TensorMemory:
    """Counts from its making to `figures`; `step` marks the step that the figures are of."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = profile(activities=activities, profile_memory=True)
        self._profiler.start()

    def step(self) -> record_function:
        return record_function(MEASURED)

    def figures(self, kept: Mapping[str, Iterable[Tensor]]) -> dict[str, int]:
        """Bytes of each kind of tensor that is kept, the peak of all, and of all that is not kept.

        `kept`: by kind, tensors that are alive after the measured step. A storage is of the kind
        that names it first.
        """
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage() for ts in kept.values() for t in ts
        }
        sizes = _sizes_of_kinds(kept)
        self._profiler.stop()
        tree = self._profiler.profiler.kineto_results.experimental_event_tree()
        events = sorted(_walk(tree), key=lambda event: event.start_time_ns)
        (measured,) = (event for event in events if event.name == MEASURED)
        until = [event for event in events if event.start_time_ns <= measured.end_time_ns]
        window = measured.start_time_ns, measured.end_time_ns
        peak, rest = _peaks(until, set(storages), window, self._device)
        return {**sizes, "peak": peak, "activations, logits and workspaces": rest}


def _sizes_of_kinds(kept: Mapping[str, Iterable[Tensor]]) -> dict[str, int]:
    seen: set[int] = set()
    sizes = dict.fromkeys(kept, 0)
    for kind, tensors in kept.items():
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                sizes[kind] += storage.nbytes()
    return sizes


def _walk(nodes: Iterable[Any]) -> Iterator[Any]:
    """Allocations and the measured step's mark."""
    for node in nodes:
        if node.name == MEASURED or node.tag == torch._C._profiler._EventType.Allocation:
            yield node
        yield from _walk(node.children)


def _peaks(
    events: list[Any], kept: set[int], window: tuple[int, int], device: torch.device
) -> tuple[int, int]:
    """The most bytes allocated in the window: all, and all but the last allocation at each of the
    addresses `kept`."""
    allocations = [
        (event.start_time_ns, event.extra_fields)
        for event in events
        if event.name != MEASURED and event.extra_fields.device.type == device.type
    ]
    last = {f.ptr: n for n, (_, f) in enumerate(allocations) if f.alloc_size > 0}
    live: dict[int, tuple[int, bool]] = {}
    total = temporary = peak = peak_temporary = 0
    for number, (when, fields) in enumerate(allocations):
        if when >= window[0]:  # what was there when the step began counts too
            peak, peak_temporary = max(peak, total), max(peak_temporary, temporary)
        if fields.alloc_size > 0:
            is_kept = fields.ptr in kept and last[fields.ptr] == number
            live[fields.ptr] = fields.alloc_size, is_kept
            change = fields.alloc_size
        else:
            size, is_kept = live.pop(fields.ptr, (0, True))
            change = -size
        total += change
        temporary += 0 if is_kept else change
    return max(peak, total), max(peak_temporary, temporary)
