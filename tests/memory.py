"""What a step really holds: two counts of live tensors on the CPU, each independent of the ledger.

`allocated_peak` asks PyTorch's profiler, which sees the allocator itself, but one thread alone;
`counted` follows every tensor that an op returns in any thread of the process until its storage is
freed, and misses what an op takes and frees within.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megallama.dist import worker

STEP = "the step that counts"


def allocated_peak(build: Callable[[], Callable[[], object]]) -> int:
    """The most bytes allocated during the second call of what `build` returns.

    What `build` and the first call allocated counts as far as it is still there.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step = build()
        step()
        with record_function(STEP):
            step()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = peak = 0
    counts = False
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == STEP:
            counts = True
        elif event.name() == "[memory]":
            now += event.nbytes()
        peak = max(peak, now) if counts else 0
    return peak


class Counter:
    """Bytes of the storages that are alive, and the most there have been since `reset`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a finalizer may run anywhere, within `see` too
        self._sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def reset(self) -> None:
        self.peak = self.now

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        with self._lock:
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata)

    def _freed(self, key: int) -> None:
        with self._lock:
            self.now -= self._sizes.pop(key)


class _Counting(TorchDispatchMode):
    """Shows a counter every tensor that an op of this thread returns."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._counter.see(leaf)
        return result


@contextmanager
def counted() -> Iterator[Counter]:
    """Count what this thread and the groups' workers make."""
    counter, run = Counter(), worker._Task.run

    def counting_run(task: Any, failure: BaseException | None) -> BaseException | None:
        with _Counting(counter):
            return run(task, failure)

    with mock.patch.object(worker._Task, "run", counting_run), _Counting(counter):
        yield counter
