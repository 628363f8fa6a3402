"""The order: epochs without repeats or gaps, held-out windows held out, no cost of start-up."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megallama.data.order import Phase, SampleOrder
from megallama.errors import ConfigError

S = 8
SIZES = {"web": 40 * S + 1, "books": 13 * S + 5, "code": 7 * S + 1}  # 40, 13, 7 windows
WEIGHTS = {"web": "0.5", "books": "0.3", "code": "0.2"}


def order(**changes) -> SampleOrder:
    arguments = {
        "tokens": SIZES,
        "phases": [Phase(None, WEIGHTS)],
        "sequence_length": S,
        "seed": 1,
        "validation_sequences": 2,
    }
    return SampleOrder(**{**arguments, **changes})


def windows_by_source(order: SampleOrder, n: int) -> dict[str, list[tuple[int, int]]]:
    where = order.locate(np.arange(n))
    names = [order.source_names[source] for source in where.source]
    rows = list(zip(where.epoch.tolist(), where.window.tolist(), strict=True))
    return {name: [r for r, m in zip(rows, names, strict=True) if m == name] for name in SIZES}


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.integers(0, 5))
def test_an_epoch_is_every_training_window_once(seed: int, held_out: int) -> None:
    it = order(seed=seed, validation_sequences=held_out)
    for name, rows in windows_by_source(it, 400).items():
        size = (SIZES[name] - 1) // S
        train = size - held_out
        source = it.source_names.index(name)
        held = set(it.validation_windows(source, np.arange(held_out)).tolist())
        assert len(held) == held_out
        for epoch in range(len(rows) // train):
            part = rows[epoch * train : (epoch + 1) * train]
            assert {e for e, _ in part} == {epoch}
            assert sorted(w for _, w in part) == sorted(set(range(size)) - held)


def test_epochs_and_sources_have_orders_of_their_own() -> None:
    rows = windows_by_source(order(), 400)
    web = [w for _, w in rows["web"]]
    assert web[:38] != web[38:76]
    assert web[:38] != sorted(web[:38])
    equal = order(tokens=dict.fromkeys(SIZES, 40 * S + 1))
    assert [w for _, w in windows_by_source(equal, 90)["web"]][:15] != [
        w for _, w in windows_by_source(equal, 90)["books"]
    ][:15]


@given(st.integers(0, 10_000), st.integers(1, 50))
def test_a_sample_does_not_depend_on_the_batch(first: int, count: int) -> None:
    it = order()
    batch = it.locate(np.arange(first, first + count))
    for i in range(0, count, 7):
        alone = it.locate(first + i)
        assert [int(a[0]) for a in alone] == [int(b[i]) for b in batch]


def test_the_order_of_names_does_not_matter() -> None:
    back = order(
        tokens=dict(reversed(SIZES.items())), phases=[Phase(None, dict(reversed(WEIGHTS.items())))]
    )
    for ours, theirs in zip(order().locate(np.arange(99)), back.locate(np.arange(99)), strict=True):
        assert np.array_equal(ours, theirs)


def test_the_seed_changes_order_and_split() -> None:
    a, b = order(), order(seed=2)
    assert not np.array_equal(a.locate(np.arange(99)).window, b.locate(np.arange(99)).window)
    assert not np.array_equal(
        a.validation_windows(2, np.arange(2)), b.validation_windows(2, np.arange(2))
    )


def test_positions_carry_from_phase_to_phase() -> None:
    phases = [
        Phase(100 * S - 3, WEIGHTS),  # the boundary is rounded up, to sample 100
        Phase(150 * S, {"code": 1}),
        Phase(None, {"web": 0.25, "code": 0.75}),
    ]
    it = order(phases=phases)
    rows = windows_by_source(it, 350)
    assert {name: len(rows) for name, rows in rows.items()} == {
        "web": 50 + 50,
        "books": 30,
        "code": 20 + 50 + 150,
    }
    assert set(it.locate(np.arange(100, 150)).source.tolist()) == {it.source_names.index("code")}
    plain = windows_by_source(order(phases=[Phase(None, {"code": 1})]), 220)["code"]
    assert rows["code"] == plain  # the phases changed when, not what
    assert it.epochs(350) == pytest.approx({"web": 100 / 38, "books": 30 / 11, "code": 220 / 5})
    assert it.epochs(100) == pytest.approx({"web": 50 / 38, "books": 30 / 11, "code": 20 / 5})
    assert it.epochs(0) == {"web": 0, "books": 0, "code": 0}


def test_a_last_phase_may_end() -> None:
    it = order(phases=[Phase(80, WEIGHTS)])
    assert len(it.locate(np.arange(10)).window) == 10
    assert it.epochs(10)["code"] == 2 / 5
    with pytest.raises(ConfigError, match="sample 10 is past the last phase"):
        it.locate(10)
    with pytest.raises(IndexError):
        it.locate(-1)
    with pytest.raises(IndexError):
        it.validation_windows(0, 2)


def test_1_4_trillion_tokens_cost_nothing_at_start_up() -> None:
    shares = {"web": 0.67, "c4": 0.15, "git": 0.045, "wiki": 0.045, "books": 0.045, "ax": 0.045}
    sizes = {name: int(1.4e12 * share) for name, share in shares.items()}
    tracemalloc.start()
    it = order(
        tokens=sizes,
        phases=[Phase(None, shares)],
        sequence_length=4096,
        validation_sequences=1000,
    )
    last = int(1.4e12) // 4096
    where = it.locate(np.arange(last - 64, last))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    limits = np.array([(sizes[name] - 1) // 4096 for name in it.source_names])
    assert (where.window < limits[where.source]).all()
    assert where.epoch.max() <= 1
    assert it.epochs(last) == pytest.approx(dict.fromkeys(shares, 1), rel=1e-3)


BAD = [
    ({"tokens": {**SIZES, "code": 3 * S}}, r"'code' has 24 tokens, but 25 are needed"),
    ({"tokens": {**SIZES, "code": 0}}, r"'code' has 0 tokens"),
    ({"validation_sequences": 7}, r"'code' has 57 tokens, but 65 are needed"),
    ({"phases": []}, "at least one phase"),
    ({"phases": [Phase(None, {})]}, "at least one source"),
    ({"phases": [Phase(None, {"wiki": 1})]}, "phase 0: no source 'wiki'"),
    (
        {"phases": [Phase(None, {"web": 1}), Phase(9, {"web": 1})]},
        "phase 0: until_tokens is needed",
    ),
    ({"phases": [Phase(9, {"web": 1}), Phase(9, {"web": 1})]}, "until_tokens 9 is not above 9"),
    ({"phases": [Phase(None, {"web": 1, "code": 0})]}, "source 'code': weight 0 is not a positive"),
    ({"phases": [Phase(None, {"web": 1, "code": 1e-7})]}, "'code': weight 1e-07 is below"),
]


@pytest.mark.parametrize("changes, message", BAD)
def test_bad_orders_are_refused(changes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        order(**changes)


def test_rounded_weights_are_reported() -> None:
    it = order(phases=[Phase(None, {"web": 0.333333, "code": 0.666667})])
    assert not it.mixture(0).exact
    assert order().mixture(0).exact
