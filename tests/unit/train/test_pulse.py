"""Signs of life: who is silent is lost to those who meet, who is slow is not. Threads stand for the
processes: one that is stopped gives no sign any more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore

from megallama.errors import LostError
from megallama.train import pulse as module
from megallama.train.meeting import Meeting
from megallama.train.process import ALONE, Process
from megallama.train.pulse import Pulse, Sign, Watch, _key

SIZE = 3


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def sign(store: Any, rank: int, count: int, step: int = 0) -> None:
    text = f'{{"count": {count}, "host": "h{rank}", "step": {step}}}'
    store.set(_key(rank), text)


def test_the_limit_is_for_silence() -> None:
    store, clock = HashStore(), Clock()
    watch = Watch([1, 2], 10.0, clock)
    for clock.now in (0.0, 8.0, 16.0, 24.0):
        sign(store, 1, int(clock.now))
        if clock.now <= 8:
            sign(store, 2, int(clock.now), step=7)
        watch.look(store)
        assert list(watch.lost) == ([2] if clock.now > 18 else [])
    error = watch.error("meeting m", watch.lost)
    assert str(error) == (
        "rank 2 is lost (host h2): no sign of life for 10 s, and it is waited for (meeting m; last "
        "step 7); try again"
    )
    assert (error.peer, error.exit_code, error.shared) == (2, 69, True)
    sign(store, 2, 99)
    watch.look(store)
    assert watch.lost == {}


def test_who_gave_no_sign_yet_may_be_starting() -> None:
    store, clock = HashStore(), Clock()
    watch = Watch([1], 10.0, clock)
    for clock.now, lost in ((299.0, []), (301.0, [1])):
        watch.look(store)
        assert list(watch.lost) == lost
    assert str(watch.error("m", watch.lost)).startswith("rank 1 is lost: it gave no sign of life")


def test_who_came_is_not_waited_for() -> None:
    store, clock = HashStore(), Clock()
    watch = Watch([1, 2], 10.0, clock)
    for rank in (1, 2):
        sign(store, rank, 1)
    watch.look(store)
    watch.heard_out(1)
    clock.now = 11.0
    watch.look(store)
    assert list(watch.missing()) == [2]
    watch.heard_out(2)
    assert watch.missing() == {}


class Flickering(Watch):
    """The pulse's thread finds rank 2 lost, and alive again as soon as anybody has looked."""

    def __init__(self) -> None:
        self._looks = 0
        super().__init__([1, 2], 10.0)

    @property
    def lost(self) -> dict[int, Sign | None]:
        self._looks += 1
        return {2: None} if self._looks == 1 else {}

    @lost.setter
    def lost(self, lost: dict[int, Sign | None]) -> None:
        pass


def test_who_is_heard_of_again_while_it_is_given_up_is_named() -> None:
    over = threading.Event()
    waiting = threading.Thread(target=over.wait, daemon=True)
    waiting.start()
    try:
        with pytest.raises(LostError, match="rank 2 is lost") as caught:
            Pulse(ALONE, 10.0).outlast(waiting, Flickering(), "meeting m")
        assert caught.value.peer == 2
    finally:
        over.set()


def together(silence: float, body: Callable[[Meeting, Pulse], Any]) -> list[Any]:
    """What `body` returns or raises in each process, by rank."""
    shared = HashStore()
    begun = threading.Barrier(SIZE)

    def live(rank: int) -> Any:
        process = Process(rank, SIZE, rank, SIZE, shared, None)
        with Pulse(process, silence) as pulse:
            while not shared.check([_key(rank)]):
                time.sleep(0.005)
            begun.wait()
            try:
                return body(Meeting(process, "m", pulse), pulse)
            except LostError as error:
                return error

    with ThreadPoolExecutor(SIZE) as threads:
        return list(threads.map(live, range(SIZE)))


@pytest.mark.parametrize("stopped", [0, 1, 2])
def test_who_is_silent_is_named_by_all_in_the_same_words(stopped: int) -> None:
    def body(here: Meeting, pulse: Pulse) -> Any:
        assert here.hold(lambda: "first") == "first"
        if here.process.rank == stopped:
            pulse.__exit__(None, None, None)
            return None
        return here.hold(lambda: "second")

    results = together(1.0, body)
    words = {str(result) for rank, result in enumerate(results) if rank != stopped}
    assert len(words) == 1
    assert words.pop().startswith(f"rank {stopped} is lost (host ")
    assert all(isinstance(r, LostError) and r.shared for r in results if r is not None)


def test_who_is_slow_is_waited_for() -> None:
    """Longer than the limit: a disk may."""

    def body(here: Meeting, pulse: Pulse) -> str:
        def do() -> str:
            time.sleep(3.0 if here.process.rank == 1 else 0)
            return "done"

        return here.hold(do, ",".join)

    assert together(2.0, body) == ["done,done,done"] * SIZE


class Hanging:
    """A store whose host was stopped."""

    def clone(self) -> Hanging:
        return self

    def _hang(self, *_: object) -> None:
        threading.Event().wait()

    check = wait = get = multi_get = _hang

    def set(self, key: str, value: str) -> None:
        if key == _key(1):
            self._hang()


def test_a_store_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK", 0.05)
    process = Process(1, SIZE, 1, SIZE, Hanging(), None)  # type: ignore[arg-type]
    with (
        Pulse(process, 0.2) as pulse,
        pytest.raises(LostError, match=r"rank 1: the job's store, .* does not answer for 0\.2 s"),
    ):
        Meeting(process, "m", pulse).hold(lambda: "")


def test_the_last_step_is_told() -> None:
    shared = HashStore()
    process = Process(1, 2, 1, 2, shared, None)
    with Pulse(process, 0.04) as pulse:
        Meeting(process, "m", pulse).did(41)
        while b'"step": 41' not in (shared.get(_key(1)) if shared.check([_key(1)]) else b""):
            time.sleep(0.005)


def test_alone_there_is_nobody_to_tell() -> None:
    with Pulse(ALONE, 1.0) as pulse:
        assert Meeting(ALONE, "m", pulse).hold(lambda: "mine") == "mine"
        assert not pulse._thread.is_alive()
