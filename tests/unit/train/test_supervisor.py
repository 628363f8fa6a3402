"""Which failure the parent of local workers tells, and how long it waits for a likelier one."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from megallama.dist.watch import Wait, Watch
from megallama.errors import EXIT_LOST, ConfigError, LostError, UserError
from megallama.train.inbox import Inbox
from megallama.train.local_worker import LAST_WORDS, Failure, LocalWorker
from megallama.train.signals import StopSignals
from megallama.train.supervisor import Team, _killed

#: The first rank of the sixth node.
FIRST = 40


def silent(rank: int, code: int) -> Failure:
    return Failure(rank, code, f"rank {rank} ended with exit code {code}", "code")


def verdict(rank: int, peer: int) -> str:
    """The real words of a rank that lost another."""
    watch = Watch(None, rank, timedelta(seconds=1))
    watch._found = [Wait(0, peer, "to send x", "data", True)]
    return str(watch.lose(LostError("", peer=peer), "data", failed=True))


def told(*failures: Failure) -> UserError:
    team = Team(Inbox(), first=FIRST)
    team.failures += failures
    with pytest.raises(UserError) as caught:
        team.outcome()
    return caught.value


@pytest.mark.parametrize("code", [1, 65, 69, 78])
def test_the_words_of_one_worker_outweigh_the_codes_of_the_others(code: int) -> None:
    words = f"rank 43: {verdict(43, 12)}" if code == EXIT_LOST else "rank 43: k=1 is damaged"
    said = Failure(43, code, words, "follows" if code == EXIT_LOST else "error")
    for failures in ([silent(41, code), said], [said, silent(41, code)]):
        error = told(*failures)
        assert (str(error), error.exit_code) == (words, code)


def test_a_code_that_no_loss_explains_outweighs_the_words_of_a_loss() -> None:
    error = told(Failure(43, EXIT_LOST, verdict(43, 12), "follows"), silent(41, 65))
    assert (str(error), error.exit_code) == ("rank 41 ended with exit code 65", 65)


def test_a_fault_of_one_s_own_outweighs_what_follows_from_it() -> None:
    gpu = "the GPU of rank 43 (host e) failed: CUDA error: x; try again without that machine"
    said = Failure(42, EXIT_LOST, verdict(42, 43), "follows")
    error = told(said, Failure(43, EXIT_LOST, gpu, "error"))
    assert (str(error), error.exit_code) == (f"rank 43: {gpu}; {said.text}", EXIT_LOST)


@pytest.mark.parametrize(
    "error, kind",
    [
        (ConfigError("no"), "error"),
        (LostError("cannot read a: EIO"), "error"),
        (LostError("rank 3 is lost", peer=3), "follows"),
        (LostError("another rank did not come", follows=True), "follows"),
    ],
    ids=str,
)
def test_a_worker_says_whether_its_error_may_follow_from_another_s(
    error: UserError, kind: str, tmp_path: Path
) -> None:
    def work(process: object, stop: object) -> int:
        raise error

    with Inbox() as inbox:
        worker = LocalWorker(2, 4, tmp_path / "store", inbox.sender)
        assert worker._guarded(work, StopSignals()) == error.exit_code
        assert list(inbox.reports()) == [Failure(2, error.exit_code, str(error), kind)]


def test_the_verdict_on_a_killed_worker_is_told_with_its_rank_in_the_job() -> None:
    said = Failure(42, EXIT_LOST, verdict(42, 43), "follows")
    assert "rank 43 is lost" in said.text
    assert str(told(said, silent(41, EXIT_LOST), _killed(43, 9))) == (
        f"rank 43 was killed by SIGKILL, maybe for want of memory: dmesg tells; {said.text}"
    )


def test_words_are_waited_for_as_long_as_the_host_of_the_store_keeps_them() -> None:
    team = Team(Inbox(), first=FIRST)
    team.alive = {1000: 40, 1001: 43}
    team.failures = [silent(41, EXIT_LOST), silent(42, EXIT_LOST)]
    assert min(team._limits().values()) > LAST_WORDS.total_seconds()
    team.failures.append(Failure(43, EXIT_LOST, verdict(43, 40), "follows"))
    assert min(team._limits().values()) < LAST_WORDS.total_seconds()


def test_the_host_of_the_store_may_yet_say_why_the_others_lost_it() -> None:
    team = Team(Inbox())
    team.alive = {1000: 0}
    team.failures = [silent(1, EXIT_LOST), Failure(2, EXIT_LOST, verdict(2, 0), "follows")]
    assert min(team._limits().values()) > LAST_WORDS.total_seconds()
    team.failures.append(_killed(3, 9))
    assert min(team._limits().values()) < LAST_WORDS.total_seconds()


def test_who_is_left_is_known_by_its_rank_in_the_job() -> None:
    team = Team(Inbox(), first=FIRST)
    team.failures = [Failure(43, EXIT_LOST, verdict(43, 40), "follows")]
    team.alive = {1000: 40}
    hurried = min(team._limits().values())
    team.alive = {1000: 41}
    assert hurried < min(team._limits().values())
