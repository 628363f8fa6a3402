"""What one layout saved another loads: a sample of `tests.chaos.pairs`, and that it can fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import pairs
from tests.layouts.pool import Pool


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(size=4) as pool:
        yield pool


def test_layouts_load_what_others_saved(pool: Pool, tmp_path: Path) -> None:
    names = ["1", "t2 d2", "t2 p2 zb-v", "d2 p2"]
    assert set(names) <= set(pairs.SMALL)
    assert pairs.faults_of(pool, tmp_path, names, steps=1) == []


def test_a_state_that_differs_is_found() -> None:
    """Of tensors, of samples, of losses."""
    good = pairs.Seen([], [(0, b"a")], [1.0])
    assert list(pairs._differences([good, good], good)) == []
    for bad, words in (
        (good._replace(different=["master/norm.weight"]), "rank 1: master/norm.weight differ"),
        (good._replace(losses=[1.00001]), "rank 1: losses differ by 1.00e-05"),
        (good._replace(losses=[float("nan")]), "rank 1: losses differ by nan"),
        (good._replace(samples=[(0, b"b")]), "other samples"),
    ):
        assert list(pairs._differences([good, bad], good)) == [words]
