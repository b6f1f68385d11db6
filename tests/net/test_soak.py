"""A minute of tests/bench/drill_soak.py: who came and went leaves nothing; and what its verdict is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.drill_soak import Sample, Soaked, drill, slope

SECONDS = 40


@pytest.mark.slow
def test_who_came_and_went_left_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda use_ipv4, use_ipv6: [])
    soaked = drill(SECONDS, 2, tmp_path)
    assert soaked.failures() == []
    # It was one: visits of more than one kind and end, recordings, and samples of a server that was busy.
    assert soaked.visits >= 5 and len(soaked.ended) >= 3 and soaked.recordings >= 1
    assert soaked.idle_before is not None
    assert max(one.tasks for one in soaked.samples) > soaked.idle_before.tasks + 10


def soaked_with(memory_per_minute: float, tasks_per_minute: float, *, tasks_left: int = 0) -> Soaked:
    """A quarter of an hour with so much growth, and 40 visits a minute."""
    found = Soaked(minutes=15.0, begun_s=[0.5] * 100)
    found.ended["page goodbye"] = 600
    for second in range(900):
        minutes = second / 60
        wobble = second % 7
        found.samples.append(
            Sample(second, 200 + memory_per_minute * minutes + wobble, 20, 50, int(30 + tasks_per_minute * minutes))
        )
    found.idle_before = Sample(-10, 150, 8, 20, 5)
    found.idle_after = Sample(910, 160, 8, 20, 5 + tasks_left)
    return found


def test_the_verdict_sees_a_leak_and_no_other() -> None:
    assert soaked_with(0.5, 0.0).failures() == []
    # 100 kB a visit at 40 visits a minute.
    assert [word for word in soaked_with(4.0, 0.0).failures() if "MB per 1000 visits" in word]
    assert [word for word in soaked_with(0.0, 2.0).failures() if word.startswith("tasks grow")]
    assert soaked_with(0.0, 0.4).failures() == []
    assert soaked_with(0.0, 0.0, tasks_left=3).failures() == ["3 tasks left"]
    late = soaked_with(0.0, 0.0)
    late.begun_s[50:] = [0.9] * 50
    assert late.failures() == ["p95 of the first picture 0.90 s late, 0.50 s early"]


def test_a_slope_is_not_moved_by_outliers() -> None:
    xs = [float(x) for x in range(60)]
    ys = [2 * x for x in xs]
    ys[10] += 1000
    ys[50] -= 1000
    assert slope(xs, ys) == pytest.approx(2.0)
