"""Where every due frame is: settled once, for one reason, by its identity."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest

from server.ledger import MAX_RECALL, FrameLedger, Outcome, Tally
from server.metrics import ServerMetrics, SessionMetrics, quantile

BUDGET_S = 0.5


def test_a_frame_is_settled_once_whatever_comes_after() -> None:
    ledger = FrameLedger(BUDGET_S)
    for index in range(4):
        ledger.arrive(index, float(index))
    assert ledger.release(0, 0.4) is Outcome.ON_TIME
    assert ledger.release(0, 9.0) is Outcome.SHOWN_BEFORE
    assert ledger.release(1, 1.6) is Outcome.LATE
    assert ledger.drop([0, 1, 2], "engine_late") == 1 and ledger.drop([2], "pacer_full") == 0
    assert (ledger.on_time, ledger.late, ledger.dropped, ledger.inside) == (1, 1, {"engine_late": 1}, 1)
    assert (ledger.overdue(3.4), ledger.overdue(3.6)) == (0, 1)


def test_a_released_frame_that_never_left_is_dropped_and_a_late_one_stays_late() -> None:
    ledger = FrameLedger(BUDGET_S)
    for index in range(2):
        ledger.arrive(index, 0.0)
    ledger.release(0, 0.1)
    ledger.release(1, 0.9)
    assert ledger.unsent(0, "encoder_behind") and not ledger.unsent(0, "encoder_behind")
    assert not ledger.unsent(1, "encoder_behind")
    assert (ledger.on_time, ledger.late, ledger.dropped) == (0, 1, {"encoder_behind": 1})


steps = st.one_of(
    st.tuples(st.just("arrive"), st.floats(0, 0.3)),
    st.tuples(st.sampled_from(["release", "unsent"]), st.integers(0, 60)),
    st.tuples(st.sampled_from(["late", "full"]), st.lists(st.integers(0, 60), max_size=8)),
)


@given(st.lists(steps, max_size=120))
def test_every_due_frame_is_on_time_late_dropped_or_inside(moves: list[tuple[str, object]]) -> None:
    ledger, now, count = FrameLedger(BUDGET_S), 0.0, 0
    for kind, what in moves:
        before = (ledger.late, dict(ledger.dropped))
        if kind == "arrive":
            assert isinstance(what, float)
            now += what
            ledger.arrive(count, now)
            count += 1
        elif isinstance(what, int):
            ledger.release(what, now) if kind == "release" else ledger.unsent(what, "encoder_behind")
        else:
            assert isinstance(what, list)
            ledger.drop(what, kind)
        assert ledger.due == count == ledger.on_time + ledger.late + ledger.dropped.total() + ledger.inside
        assert 0 <= ledger.overdue(now) <= ledger.inside and ledger.on_time >= 0
        # What is missed once stays missed: counters only rise.
        assert ledger.late >= before[0] and all(ledger.dropped[name] >= n for name, n in before[1].items())


def test_what_may_still_be_recalled_is_bounded() -> None:
    ledger = FrameLedger(BUDGET_S)
    for index in range(2 * MAX_RECALL):
        ledger.arrive(index, 0.0)
        ledger.release(index, 0.1)
    assert not ledger.unsent(0, "encoder_behind") and ledger.unsent(2 * MAX_RECALL - 1, "encoder_behind")


@given(st.lists(st.floats(0, 20), min_size=1, max_size=200), st.sampled_from([0.5, 0.95, 0.99]))
def test_a_tally_gives_the_quantiles_to_a_millisecond(values: list[float], share: float) -> None:
    tally = Tally()
    for value in values:
        tally.add(value)
    exact = quantile(values, share)
    assert exact is not None and tally.quantile_s(share) == pytest.approx(min(exact, 10.0), abs=0.00051)
    assert Tally().quantile_s(share) is None


# --- the figures of a session


def show(metrics: SessionMetrics, first: int, instants: list[float]) -> None:
    for index, now in enumerate(instants, first):
        metrics.on_arrival(now, index, now, admitted=True)
        metrics.on_release(now + 0.1, index, now, restyled=True)


def test_the_time_to_the_first_picture_is_the_sum_of_its_stages() -> None:
    server = ServerMetrics()
    metrics = SessionMetrics(server, offered_at=10.0, latency_budget_s=BUDGET_S)
    metrics.on_stage("answer", 10.02)
    metrics.on_stage("connected", 10.12)
    metrics.on_arrival(10.15, 0, 10.15, admitted=True)
    metrics.on_submitted(10.16)
    metrics.on_submitted(10.30)  # only the first one counts
    metrics.on_chunk(10.26, 0.02, 0.08)
    assert set(metrics.stats()["ttff"]) == {"answer_ms", "connected_ms", "camera_ms", "chunk_ms", "engine_ms"}  # type: ignore[call-overload]
    metrics.on_release(10.27, 0, 10.15, restyled=True)
    stages = metrics.stats()["ttff"]
    assert isinstance(stages, dict) and stages == {
        "answer_ms": 20.0,
        "connected_ms": 100.0,
        "camera_ms": 30.0,
        "chunk_ms": 10.0,
        "engine_ms": 100.0,
        "playout_ms": 10.0,
    }
    assert sum(stages.values()) == pytest.approx(metrics.stats()["ttff_ms"])
    assert 'livebrush_ttff_stage_seconds_count{stage="engine"} 1.0' in generate_latest(server.registry).decode()


def test_intervals_jitter_and_freezes_are_told_and_a_pause_of_the_camera_is_none() -> None:
    server = ServerMetrics()
    metrics = SessionMetrics(server, offered_at=0.0, latency_budget_s=BUDGET_S)
    show(metrics, 0, [i * 0.04 for i in range(50)])
    stats = metrics.stats()
    assert (stats["interval_ms_p99"], stats["jitter_ms_p99"], stats["freezes"]) == (40.0, 0.0, 0)
    # Frames come and nothing is shown for 0.9 s.
    for index in range(50, 70):
        metrics.on_arrival(2.0 + (index - 50) * 0.04, index, 2.0, admitted=True)
    metrics.on_release(2.9, 69, 2.76, restyled=True)
    assert metrics.freezes == 1 and metrics.frozen_s == pytest.approx(0.9)
    assert metrics.stats()["interval_ms_p99"] == pytest.approx(840.0)
    # The camera is off for ten seconds: nobody's picture froze.
    show(metrics, 70, [13.0 + i * 0.04 for i in range(50)])
    summary = metrics.summary(16.0)
    assert metrics.freezes == 1 and summary["frozen_s"] == 0.9
    assert metrics.stats()["interval_ms_p99"] == 40.0 and summary["interval_ms_p50"] == 40.0
    assert "livebrush_freezes_total 1.0" in generate_latest(server.registry).decode()


def test_the_summary_is_of_the_whole_session_and_its_shares_of_what_is_settled() -> None:
    metrics = SessionMetrics(ServerMetrics(), offered_at=0.0, latency_budget_s=BUDGET_S)
    show(metrics, 0, [i * 0.04 for i in range(96)])
    for index in range(96, 104):
        metrics.on_arrival(4.0, index, 4.0, admitted=True)
    metrics.on_dropped(4.1, "engine_late", range(96, 100))
    summary = metrics.summary(300.0)
    assert (summary["dmr"], summary["on_time"], summary["inside"]) == (0.04, 0.96, 4)
    assert (summary["age_ms_p50"], summary["age_ms_p99"], summary["seconds"]) == (100.0, 100.0, 300.0)


def test_frames_inside_past_their_deadline_are_misses_already() -> None:
    metrics = SessionMetrics(ServerMetrics(), offered_at=0.0, latency_budget_s=BUDGET_S)
    for index in range(10):
        metrics.on_arrival(1.0, index, 1.0, admitted=True)
    assert metrics.stats(1.4)["dmr"] == 0.0 and metrics.stats(1.6)["dmr"] == 1.0
