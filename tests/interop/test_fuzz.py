"""Ten seconds of tests/bench/drill_fuzz.py, which found two answers of 500 when it first ran."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.drill_fuzz import drill

SECONDS = 10


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """The good client too: aioice leaves 127.0.0.1 out, and no test sends anywhere else."""
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])


@pytest.mark.slow
def test_mangled_requests_break_nothing(tmp_path: Path) -> None:
    outcome = drill(SECONDS, 3, tmp_path)
    assert outcome.failures == []
    # It got past the gates: offers were accepted, refused for their text, and for what they ask.
    assert min(outcome.statuses[status] for status in (201, 204, 400, 413, 422)) > 0
