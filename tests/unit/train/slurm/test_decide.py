"""What a job does after each end: codes, blame, relaunch, requeue, giving up."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from megallama.dist.compat import AcceleratorError, DistError
from megallama.dist.watch import Wait, Watch
from megallama.errors import CorruptError, LostError
from megallama.train.failures import explained_loss
from megallama.train.process import ALONE
from megallama.train.replicas import Difference
from megallama.train.slurm.attempt import Attempt, Health
from megallama.train.slurm.cause import blamed, why
from megallama.train.slurm.decide import Job, after, choose
from megallama.train.slurm.history import History, Saved, newest_checkpoint, read_history

NODES = ("a", "b", "c", "d")
ERROR = "megallama: error: "


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    """Of nodes a to d, two tasks on each."""
    folder = tmp_path / "run/slurm/7.0.1"
    for kind in ("started", "ended", "health"):
        (folder / kind).mkdir(parents=True)
    for index, node in enumerate(NODES):
        (folder / "started" / str(index)).write_text(f"{node}\n")
    return Attempt(folder)


def end(attempt: Attempt, codes: dict[int, int], errors: dict[int, str] | None = None) -> None:
    for task, code in codes.items():
        (attempt.folder / "ended" / str(task)).write_text(f"{code} {NODES[task // 2]}\n")
    for task, text in (errors or {}).items():
        (attempt.folder / f"rank-{task}.log").write_text(f"step 1\n{ERROR}{text}\n")


def rest(code: int, *but: int) -> dict[int, int]:
    return {task: code for task in range(8) if task not in but}


CAUSES = {
    "done": ({}, 0, "", 0),
    "saved": (rest(75), 75, "USR1", 75),
    "time box": (rest(75), 75, "", 75),
    "asked while it imported": (rest(75, 3) | {3: 138}, 138, "USR1", 75),
    "asked by a person": (rest(130), 130, "", 130),
    "corrupt, and the others lost it": (rest(69, 5) | {5: 65}, 69, "", 65),
    "a bug": (rest(69, 5) | {5: 1}, 69, "", 1),
    "bad configuration": (rest(78), 78, "", 78),
    "killed": (rest(69, 5) | {5: 137}, 137, "", 69),
    "killed, and a bug that follows": (rest(69, 5, 6) | {5: 139, 6: 1}, 139, "", 69),
    "aborted by NCCL": (rest(134), 134, "", 69),
    "a GPU failed, and NCCL aborted the others": (rest(134, 5) | {5: 69}, 134, "", 69),
    "lost while asked": (rest(69), 69, "USR1", 69),
    "no word": ({}, 137, "", 69),
    "megallama is not there": (rest(127), 127, "", 127),
    "some saved before one was lost": (rest(75, 5) | {5: 69}, 75, "", 69),
}


@pytest.mark.parametrize("ends, code, asked, wanted", CAUSES.values(), ids=CAUSES)
def test_the_code_that_no_other_explains(
    attempt: Attempt, ends: dict[int, int], code: int, asked: str, wanted: int
) -> None:
    end(attempt, ends)
    assert why(attempt, code, asked) == wanted


def verdict(peer: int) -> str:
    """The real words of a rank that lost another."""
    watch = Watch(None, 0, timedelta(seconds=1))
    watch._found = [Wait(0, peer, "to send x", "data", True)]
    return str(watch.lose(LostError("", peer=peer), "data", failed=True))


def failure(rank: int, error: RuntimeError) -> str:
    """The real words of a rank that torch raised `error` on."""
    with pytest.raises(LostError) as caught, explained_loss(replace(ALONE, rank=rank)):
        raise error
    return f"rank {rank}: {caught.value}"


BLAME = {
    "named": (rest(69, 4), {0: verdict(4)}, ["c"]),
    "named, and it said nothing": (rest(69, 4, 5), {0: verdict(4)}, ["c"]),
    "silent": (rest(69, 0, 1), {2: "rank 2 does not reach the store"}, ["a"]),
    "killed": (rest(69, 6) | {6: 137}, {}, ["d"]),
    "damaged copy": (
        rest(69),
        {0: f"step 3: {Difference(7, 'w', 1).text('d.example')}; memory or a link is faulty"},
        ["d"],
    ),
    "a worker of a node's own": (
        {task: 69 for task in (0, 2, 4, 6)},
        {4: "rank 1 was killed by SIGKILL, maybe for want of memory: dmesg tells"},
        ["c"],
    ),
    "a failed GPU": (
        rest(134, 5) | {5: 69},
        {5: failure(5, AcceleratorError("CUDA error: uncorrectable ECC error encountered"))},
        ["c"],
    ),
    "NCCL failed on one rank": (
        rest(134, 5) | {5: 69},
        {5: failure(5, DistError("NCCL error: unhandled system error"))},
        [],
    ),
    "the network": (rest(69, 0, 1, 4, 5), {2: f"{verdict(0)}; {verdict(4)}"}, []),
    "SLURM ended the step": ({0: 69}, {}, []),
    "nobody in particular": (rest(134), {}, []),
}


@pytest.mark.parametrize("ends, errors, wanted", BLAME.values(), ids=BLAME)
def test_blame(
    attempt: Attempt, ends: dict[int, int], errors: dict[int, str], wanted: list[str]
) -> None:
    end(attempt, ends, errors)
    assert blamed(attempt, ranks_per_node=2) == wanted


def test_a_lone_node_without_a_word_is_not_blamed(attempt: Attempt) -> None:
    for index in (1, 2, 3):
        (attempt.folder / "started" / str(index)).unlink()
    assert blamed(attempt, ranks_per_node=2) == []


def job(wanted: int = 4, allocated: str = "abcd", asked: str = "", state: str = "RUNNING") -> Job:
    return Job(wanted, list(allocated), asked, state)


def begun(attempt: Attempt) -> History:
    history = History()
    history.begin(attempt, Saved())
    return history


@pytest.mark.parametrize("code", [1, 65, 78, 130, 0, 126])
def test_these_codes_end_the_job(attempt: Attempt, code: int) -> None:
    end(attempt, rest(code) if code else {})
    assert after(attempt, job(), begun(attempt), code, 2)[0] == f"stop {code}"


@pytest.mark.parametrize("code", [0, 1, 65, 69, 75, 137])
@pytest.mark.parametrize(
    "ending", [job(asked="TERM"), job(state="COMPLETING"), job(state="CANCELLED")], ids=str
)
def test_a_job_that_slurm_ends_is_left_alone(attempt: Attempt, code: int, ending: Job) -> None:
    end(attempt, rest(code) if code else {})
    history = begun(attempt)
    assert after(attempt, ending, history, code, 2)[0] == "stop 75"
    assert choose(attempt, ending, history, (0, 0))[0] == "stop 75"


def test_saved_goes_back_to_the_queue(attempt: Attempt) -> None:
    end(attempt, rest(75))
    assert after(attempt, job(asked="USR1"), begun(attempt), 75, 2)[0] == "requeue"
    assert after(attempt, job(state=""), begun(attempt), 75, 2)[0] == "requeue", "no answer"


def test_a_spare_takes_the_place_of_a_lost_node(attempt: Attempt) -> None:
    end(attempt, rest(69, 4, 5), {0: verdict(4)})
    history = begun(attempt)
    action, words = after(attempt, job(allocated="abcde"), history, 69, 2)
    assert action == "relaunch"
    assert verdict(4) in words
    assert "c: lost" in words
    assert job(allocated="abcde").candidates(history) == ["a", "b", "d", "e"]


def test_without_a_spare_the_job_waits_for_other_nodes(attempt: Attempt) -> None:
    end(attempt, rest(69, 4, 5), {0: verdict(4)})
    assert after(attempt, job(), begun(attempt), 69, 2)[0] == "requeue c"


def test_words_are_told_before_codes(attempt: Attempt) -> None:
    errors = {task: f"rank {task} ended with exit code 69" for task in range(7)}
    end(attempt, rest(69), errors | {7: verdict(4)})
    _, words = after(attempt, job(allocated="abcde"), begun(attempt), 69, 2)
    assert words.startswith(f"task 7: {verdict(4)}\ntask 0: rank 0 ended")


def test_near_its_time_limit_a_lost_job_is_not_started_again(attempt: Attempt) -> None:
    end(attempt, rest(69, 4, 5), {0: verdict(4)})
    action, _ = after(attempt, job(allocated="abcde", asked="USR1"), begun(attempt), 69, 2)
    assert action == "requeue c"


def test_crash_loops_end(tmp_path: Path) -> None:
    """Three attempts an allocation, five allocations; a newer checkpoint forgives all."""
    history, actions = History(), []
    for allocation in range(9):
        for number in range(1, 9):
            folder = tmp_path / f"7.{allocation}.{number}"
            (folder / "started").mkdir(parents=True)
            attempt = Attempt(folder)
            history.begin(attempt, Saved(2 if allocation > 1 else 1))
            actions.append(after(attempt, job(), history, 137, 2)[0])
            if actions[-1] != "relaunch":
                break
        if actions[-1].startswith("stop"):
            break
    once = ["relaunch", "relaunch", "requeue"]
    assert actions == once * 2 + once * 4 + ["relaunch", "relaunch", "stop 69"]


def test_another_job_begins_anew_but_knows_nodes_that_failed_often(tmp_path: Path) -> None:
    History("6", failures={"b": 2}).write(tmp_path)
    history = read_history(tmp_path, "7")
    for restarts in range(5):
        history.begin(Attempt(tmp_path / f"7.{restarts}.1"), Saved())
    history.blame(["a", "b"])
    assert history.left_out == ["a", "b"]
    assert not history.may_requeue
    history.write(tmp_path)
    other = read_history(tmp_path, "8")
    other.begin(Attempt(tmp_path / "8.0.1"), Saved())
    assert other.left_out == ["b"], "three times, in two jobs"
    assert other.may_requeue
    other.write(tmp_path)
    assert read_history(tmp_path, "7") == history, "other jobs wipe nothing"


def test_two_jobs_of_a_run_undo_nothing_of_each_other(tmp_path: Path) -> None:
    """Though both read before either writes: an array, or a second submission."""
    both = [read_history(tmp_path, job) for job in ("7", "8")]
    for history in both:
        history.begin(Attempt(tmp_path / f"{history.job}.0.1"), Saved(5, "step-00000002"))
        history.blame(["a", f"only-{history.job}"])
    for history in both:
        history.write(tmp_path)
    for history in both:
        found = read_history(tmp_path, history.job)
        assert (found.attempts, found.bad) == (1, ["a", f"only-{history.job}"])
        assert [found.failed(node) for node in ("a", "only-7", "only-8")] == [2, 1, 1]
    third = read_history(tmp_path, "9")
    assert (third.attempts, third.bad, third.failed("a")) == (0, [], 2)


@pytest.mark.parametrize("ending", [job(asked="TERM"), job(state="COMPLETING")], ids=str)
@pytest.mark.parametrize("begins", [False, True])
def test_an_allocation_that_slurm_took_away_is_no_failed_one(
    begins: bool, ending: Job, tmp_path: Path
) -> None:
    history = History()
    for restarts in range(6):
        (tmp_path / f"7.{restarts}.1/started").mkdir(parents=True)
        attempt = Attempt(tmp_path / f"7.{restarts}.1")
        history.begin(attempt, Saved())
        if restarts == 5:
            break
        if begins:
            choose(attempt, ending, history, (0, 0))
        else:
            after(attempt, ending, history, 143, 2)
    assert after(attempt, job(asked="USR1"), history, 69, 2)[0] == "requeue"


def test_nodes_that_failed_often_are_named_and_asked_of_slurm_no_more(attempt: Attempt) -> None:
    for node in "ac":
        health(attempt, x=well(node))
    history = begun(attempt)
    history.failures = {"b": 3}
    history.blame(["d"])
    action, words = choose(attempt, job(wanted=3), history, (99, 101))
    assert action == "requeue b,d"
    assert words.splitlines()[:2] == [
        "b: failed 3 times before; left out (history/)",
        "d: failed once before; left out (history/)",
    ]


def health(attempt: Attempt, **found: Health) -> None:
    for node in found.values():
        node.write(attempt.folder / "health")


def well(node: str, **more: object) -> Health:
    return Health(node, **{"time": 100.0, **more})  # type: ignore[arg-type]


UNWELL = {
    "a fault": (well("b", faults=("has 7 of 8 GPUs",)), "b: has 7 of 8 GPUs"),
    "late": (well("b", time=131.0), "b: its clock is wrong by 31 s or more"),
    "early": (well("b", time=60.0), "b: its clock is wrong by 40 s or more"),
    "slow": (well("b", bandwidth=150.0), "b: its GPUs reduce at 150 GB/s, below 184"),
    "silent": (None, "b: does not answer"),
}


@pytest.mark.parametrize("node, words", UNWELL.values(), ids=UNWELL)
def test_an_unwell_node_is_named_and_left_out(
    attempt: Attempt, node: Health | None, words: str
) -> None:
    history = begun(attempt)
    for other in "acd":
        health(attempt, x=well(other, bandwidth=230.0))
    if node:
        health(attempt, x=node)
    clock = (100.0, 100.0)
    action, said = choose(attempt, job(wanted=3), history, clock)
    assert (action, history.bad) == ("train a,c,d", ["b"])
    assert said == f"{words}; left out"
    action, _ = choose(attempt, job(wanted=4), history, clock)
    assert action == "requeue b"


def test_a_node_whose_network_is_slow_is_left_out(attempt: Attempt) -> None:
    for node, peers in {"a": "bd", "b": "ac", "c": "bd", "d": "ca"}.items():
        links = {peer: 2.0 if "b" in (node, peer) else 24.0 for peer in peers}
        health(attempt, x=well(node, links=links))
    history = begun(attempt)
    action, words = choose(attempt, job(wanted=3), history, (99, 101))
    assert (action, history.bad) == ("train a,c,d", ["b"])
    assert words == (
        "b: its network is slow: 2.0 GB/s with a and 2.0 GB/s with c, below 16.8; left out"
    )


def test_of_two_nodes_that_do_not_exchange_none_is_left_out(attempt: Attempt) -> None:
    for node, peer in ("ab", "ba"):
        health(attempt, x=well(node, links={peer: 0.0}))
    history = begun(attempt)
    action, words = choose(attempt, job(wanted=2, allocated="ab"), history, (99, 101))
    assert (action, history.bad) == ("train a,b", [])
    assert words == "a: none with b, below 0.0; one of the two is slow"


def test_all_well(attempt: Attempt) -> None:
    for node in NODES:
        health(attempt, x=well(node))
    assert choose(attempt, job(wanted=3), begun(attempt), (99, 101)) == ("train a,b,c", "")
    assert choose(attempt, job(asked="USR1"), begun(attempt), (99, 101))[0] == "requeue"


def test_an_unfinished_node_is_asked_again_and_not_blamed(attempt: Attempt) -> None:
    """A dead node makes SLURM end the looks at the others."""
    for node in "abc":
        health(attempt, x=well(node, finished=False))
    history = begun(attempt)
    assert choose(attempt, job(wanted=3), history, (99, 101))[0] == "relaunch"
    assert history.bad == ["d"]


def test_a_node_that_alone_does_not_finish_is_at_fault(attempt: Attempt) -> None:
    nodes = "abcdefgh"
    for node in nodes:
        health(attempt, x=well(node, finished=node != "h"))
    history = begun(attempt)
    action, words = choose(attempt, job(wanted=7, allocated=nodes), history, (99, 101))
    assert (action, history.bad) == ("train a,b,c,d,e,f,g", ["h"])
    assert words == "h: did not finish looking at itself; left out"


def test_nodes_that_do_not_finish_are_named(attempt: Attempt) -> None:
    nodes = "abcdefgh"
    for node in nodes:
        health(attempt, x=well(node, finished=node < "g"))
    history = begun(attempt)
    action, words = choose(attempt, job(wanted=6, allocated=nodes), history, (99, 101))
    assert (action, history.bad) == ("train a,b,c,d,e,f", [])
    assert words.splitlines() == [f"{node}: did not finish looking at itself" for node in "gh"]


def test_what_all_nodes_lack_is_no_node_s_fault(attempt: Attempt) -> None:
    for node in NODES:
        health(attempt, x=well(node, faults=("cannot write",)))
    history = begun(attempt)
    assert choose(attempt, job(), history, (99, 101))[0] == "relaunch"
    assert history.bad == []


def test_few_answers_say_nothing_of_the_silent(attempt: Attempt) -> None:
    health(attempt, x=well("a"))
    history = begun(attempt)
    action, words = choose(attempt, job(), history, (99, 101))
    assert (action, history.bad) == ("relaunch", [])
    assert "b: does not answer\n" in words


def test_the_history_outlives_the_job(tmp_path: Path) -> None:
    history = read_history(tmp_path, "7")
    assert history == History("7")
    history.begin(Attempt(tmp_path / "7.2.1"), Saved(3, "step-00000005"))
    history.blame(["a"])
    history.write(tmp_path)
    assert read_history(tmp_path, "7") == history
    wrong = '{"newest": [], "failures": {"a": [3]}}'
    for torn in ('{"job": ', '{"job": "7"}', "[]", '{"newest": [], "failures": []}', wrong):
        (tmp_path / "history/7.json").write_text(torn)
        with pytest.raises(CorruptError, match="remove it"):
            read_history(tmp_path, "7")


def test_a_checkpoint_without_its_manifest_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "slurm") == Saved()
    (tmp_path / "checkpoints/step-00000010").mkdir(parents=True)
    save(tmp_path, 5, time=1)
    assert newest_checkpoint(tmp_path / "slurm") == Saved(1, "step-00000005")


def save(run: Path, step: int, time: int) -> Path:
    manifest = run / f"checkpoints/step-{step:08d}/manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    os.utime(manifest, ns=(time, time))
    return manifest


def test_progress_is_what_was_written_later(tmp_path: Path) -> None:
    def attempts() -> int:
        history.begin(Attempt(tmp_path / "7.0.1"), newest_checkpoint(tmp_path / "slurm"))
        return history.attempts

    history = History()
    save(tmp_path, 900, time=1)
    damaged = save(tmp_path, 1000, time=2)
    assert [attempts(), attempts()] == [1, 2]
    save(tmp_path, 910, time=3)
    assert [attempts(), attempts()] == [1, 2], "the run went on from step 900"
    damaged.unlink()
    (tmp_path / "checkpoints/step-00000910/manifest.json").unlink()
    assert attempts() == 3, "less is no progress"


def test_torn_files_say_nothing(attempt: Attempt) -> None:
    (attempt.folder / "ended/0").write_text("")
    (attempt.folder / "ended/1").write_text("x")
    (attempt.folder / "ended/.nfs1").write_text("1 a")
    (attempt.folder / "health/a.json").write_text('{"node"')
    assert attempt.ends == {}
    assert attempt.health == {}
