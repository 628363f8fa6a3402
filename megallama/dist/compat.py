"""What torch.distributed calls by other names in other versions, or leaves out of its annotations.

Written against torch 2.11 to 2.13. Process groups are made as objects, without
`init_process_group`: nothing global is set up, and only a group's members connect.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
import torch.distributed as c10d
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore as PrefixStore
from torch._C._distributed_c10d import Store as Store

#: A device's own failure, such as an ECC error; and what c10d raises, for NCCL and the store alike.
AcceleratorError: type[RuntimeError] = torch.AcceleratorError
DistError: type[RuntimeError] = c10d.DistError


class Work(Protocol):
    """An operation under way."""

    def wait(self, timeout: timedelta = ...) -> bool: ...


class Backend(Protocol):
    """A process group object, as far as every backend has it."""

    def send(self, tensors: Sequence[Tensor], dst: int, tag: int) -> Work: ...

    def recv(self, tensors: Sequence[Tensor], src: int, tag: int) -> Work: ...


def _gloo_devices(hostname: str | None) -> list[Any]:
    """The sockets that gloo listens on: `hostname`, else GLOO_SOCKET_IFNAME, else its own choice.

    Every group has a device, and so an input and output thread, of its own.
    """
    gloo = c10d.ProcessGroupGloo
    if hostname is not None:
        return [gloo.create_device(hostname=hostname)]
    interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    if interfaces:
        return [gloo.create_device(interface=name) for name in interfaces]
    return [gloo.create_default_device()]


def gloo_backend(
    store: Store, rank: int, size: int, timeout: timedelta, hostname: str | None
) -> Backend:
    """Connect the `size` ranks that meet in `store`; returns when all have come.

    Raises RuntimeError where a rank does not come within `timeout`.
    """
    gloo = cast(Any, c10d.ProcessGroupGloo)
    options = gloo._Options()
    options._devices = _gloo_devices(hostname)
    options._timeout = timeout
    options._threads = 1  # they run gloo's own collectives, which we do not use
    return cast(Backend, gloo(store, rank, size, options))


def nccl_backend(store: Store, rank: int, size: int, timeout: timedelta) -> Any:
    """A NCCL group of `size` ranks; it connects with its first operation."""
    nccl = cast(Any, c10d).ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timeout
    return nccl(store, rank, size, options)


def _method(backend: Any, *names: str) -> Callable[..., Work]:
    """The first of these methods that the backend has."""
    for name in names:
        method: Callable[..., Work] | None = getattr(backend, name, None)
        if method is not None:
            return method
    raise AttributeError(f"torch {torch.__version__}: {type(backend).__name__} has no {names}")


def all_gather_single(backend: Any, out: Tensor, x: Tensor) -> Work:
    """(t, …) shards into `out` (T, …), on a backend that is not gloo."""
    return _method(backend, "all_gather_single", "_allgather_base")(out, x, _options("Allgather"))


def reduce_scatter_single(backend: Any, out: Tensor, x: Tensor) -> Work:
    """The sum over ranks of x (T, …), this rank's rows into `out` (t, …)."""
    method = _method(backend, "reduce_scatter_single", "_reduce_scatter_base")
    return method(out, x, _options("ReduceScatter"))


def all_to_all_single(backend: Any, out: Tensor, x: Tensor) -> Work:
    """Row p of x (n, …) to rank p; row p of `out` (n, …) from rank p."""
    method = _method(backend, "all_to_all_single", "alltoall_base")
    return method(out, x, [], [], _options("AllToAll"))


def all_reduce(backend: Any, x: Tensor) -> Work:
    """x becomes the sum over ranks."""
    return cast(Work, backend.allreduce([x], _options("Allreduce")))


def _options(kind: str) -> Any:
    """An asynchronous operation's options: the sum, and the group's own timeout."""
    options = getattr(torch._C._distributed_c10d, f"{kind}Options")()
    if hasattr(options, "asyncOp"):
        options.asyncOp = True
    return options


@contextmanager
def coalescing(backend: Any) -> Iterator[list[Work]]:
    """One call for all operations issued inside; append their works to the list that this yields.

    At the end the list holds what there is to wait for: the work of the whole where the backend
    coalesces, else each one's.
    """
    works: list[Work] = []
    if not getattr(backend, "supports_coalescing", False):
        yield works
        return
    backend._start_coalescing()
    try:
        yield works
    finally:
        whole = backend._end_coalescing()
    works[:] = [whole] if whole is not None else []
