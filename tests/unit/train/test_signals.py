"""Signals become a flag, and the handlers that were there before come back."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from megallama.train.inbox import Inbox
from megallama.train.signals import StopSignals

NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


@pytest.fixture
def handlers() -> Iterator[dict[int, object]]:
    """Handlers of the test's own, so that one left behind shows."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    for number in NUMBERS:
        signal.signal(number, lambda number, frame: None)
    yield {number: signal.getsignal(number) for number in NUMBERS}
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number, code", list(zip(NUMBERS, (75, 75, 75, 130), strict=True)))
def test_a_signal_sets_the_exit_code(
    handlers: dict[int, object], number: signal.Signals, code: int
) -> None:
    with StopSignals() as stop:
        assert stop.code is None
        signal.raise_signal(number)
        assert stop.code == code
    assert {number: signal.getsignal(number) for number in NUMBERS} == handlers


def test_handlers_come_back_after_an_error(handlers: dict[int, object]) -> None:
    with pytest.raises(ZeroDivisionError), StopSignals():
        raise ZeroDivisionError
    assert {number: signal.getsignal(number) for number in NUMBERS} == handlers


def test_a_second_ctrl_c_ends_at_once(handlers: dict[int, object]) -> None:
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.code == 130
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert {number: signal.getsignal(number) for number in NUMBERS} == handlers


def test_only_ctrl_c_twice_is_impatient(handlers: dict[int, object]) -> None:
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.code == 75
        signal.raise_signal(signal.SIGINT)
        assert stop.code == 130
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_hangup_that_is_ignored_stays_so(handlers: dict[int, object]) -> None:
    """As `nohup` starts a command."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.code is None
        with Inbox() as inbox:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
            assert inbox.signals() == bytes([signal.SIGTERM])
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
