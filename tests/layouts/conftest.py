"""One pool of workers for all tests of layouts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.layouts.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    with Pool() as pool:
        yield pool
