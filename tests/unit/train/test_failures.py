"""What torch raises for a device or a connection that fails ends in one line, with code 69. The
errors are raised by hand: no test breaks a GPU."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
import torch
from torch.distributed import DistBackendError

from megallama.cli.main import main
from megallama.dist.nccl import Issued
from megallama.errors import EXIT_CONFIG, EXIT_LOST, LostError
from megallama.train.failures import explained_loss
from megallama.train.process import ALONE
from megallama.train.step import TrainStep
from tests.conftest import ConfigFile

ECC = "CUDA error: uncorrectable ECC error encountered"
ASYNC = "\nCUDA kernel errors might be asynchronously reported"
CUBLAS = "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"
GPU = f"the GPU of rank 0 (host {socket.gethostname()}) failed: "
AWAY = "; try again without that machine"


def raising(error: Exception) -> Callable[..., None]:
    def run(*arguments: object, **named: object) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    "error, words",
    [
        (torch.AcceleratorError(ECC + ASYNC), f"{GPU}{ECC}{AWAY}"),
        (RuntimeError(CUBLAS), f"{GPU}{CUBLAS}{AWAY}"),
        (RuntimeError(f"rms_norm: {ECC}"), f"{GPU}rms_norm: {ECC}{AWAY}"),
        (
            DistBackendError("NCCL error: unhandled system error\nLast error:"),
            "a NCCL operation failed (NCCL error: unhandled system error); try again",
        ),
    ],
    ids=["device", "cuBLAS", "our own kernel", "NCCL"],
)
def test_a_loss_is_one_line(error: Exception, words: str) -> None:
    with pytest.raises(LostError) as caught, explained_loss(ALONE):
        raise error
    assert str(caught.value) == words


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes cannot be multiplied"),
        RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasGemmEx`"),
        RuntimeError("rope: CUDA error: invalid configuration argument"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
        torch.AcceleratorError("CUDA error: no kernel image is available for execution"),
        torch.AcceleratorError("CUDA error: out of memory"),
        torch.OutOfMemoryError("CUDA out of memory"),
        LostError("rank 3 is lost"),
    ],
    ids=str,
)
def test_others_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, explained_loss(ALONE):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    "owner, name", [(TrainStep, "run"), ("megallama.train.memory", "find_room")]
)
def test_a_run_whose_device_fails_ends_with_69(
    config_file: ConfigFile,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    owner: object,
    name: str,
) -> None:
    where = (f"{owner}.{name}",) if isinstance(owner, str) else (owner, name)
    monkeypatch.setattr(*where, raising(torch.AcceleratorError(ECC)))
    assert main(["train", str(config_file())]) == EXIT_LOST
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"{GPU}{ECC}{AWAY}")


def test_a_device_without_memory_is_no_lost_one(
    config_file: ConfigFile, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = torch.AcceleratorError("CUDA error: out of memory")
    monkeypatch.setattr(TrainStep, "run", raising(error))
    assert main(["train", str(config_file())]) == EXIT_CONFIG
    assert "has no memory left" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "bench"])
def test_both_commands_say_alike_what_a_device_failed_of(
    config_file: ConfigFile,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    monkeypatch.setattr(TrainStep, "run", raising(torch.AcceleratorError(ECC)))
    assert main([command, str(config_file())]) == EXIT_LOST
    assert capsys.readouterr().err == f"megallama: error: {GPU}{ECC}{AWAY}\n"


class Work:
    def __init__(self, error: Exception) -> None:
        self.wait = raising(error)


@pytest.mark.parametrize(
    "error, words", [(torch.AcceleratorError(ECC), "the GPU of"), (RuntimeError("x"), "NCCL")]
)
def test_a_device_that_fails_while_nccl_is_waited_for_is_the_device(
    error: Exception, words: str
) -> None:
    handle = Issued([Work(error)], 0, lambda: None, [])
    with pytest.raises(LostError, match=words), explained_loss(ALONE):
        handle.wait()
