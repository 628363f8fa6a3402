"""Every planted fault is found, for what it is."""

from __future__ import annotations

import pytest

from tests.check.planted import PLANTED, find


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name: str) -> None:
    planted = PLANTED[name]
    fault = find(planted)
    assert fault is not None
    assert fault.kind == planted.kind
    assert planted.says in fault.text
    if fault.kind in ("mismatch", "deadlock"):
        assert len(fault.ranks) == len(fault.sites) >= 2
        assert all(not site or site.startswith("megallama/") for site in fault.sites)
        assert all(f"rank {rank} " in fault.text for rank in fault.ranks)
        assert all(site in fault.text for site in fault.sites)
