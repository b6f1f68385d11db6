"""The ladder: what is given up and in which order, how soon, how seldom, and all the way back."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.api import Capacity, ChunkCostAt
from engine.config import EngineSettings
from server.ladder import (
    CLEAN_S,
    LAST_S,
    MARGIN_S,
    MISSED_SHARE,
    MOVE_PERIOD_S,
    PROMISE_LOAD,
    RISE_LOAD,
    STAY_LOAD,
    Demand,
    Ladder,
    Move,
    Rung,
    Signals,
    rungs,
)
from server.settings import ServerSettings

SERVER = ServerSettings(max_fps=24, min_fps=8)
SAMPLE_S = 0.25


def capacity_of(chunk_s: float, *, small: bool = True, steps_max: int = 4) -> Capacity:
    """An engine like the small model's: a step more costs 0.7 of the first, the smaller size 0.56."""
    sizes = (False, True) if small else (False,)
    costs = []
    for is_small in sizes:
        for steps in range(1, steps_max + 1):
            cost_s = chunk_s * (0.3 + 0.7 * steps) * (0.56 if is_small else 1)
            costs.append(ChunkCostAt(steps, is_small, cost_s, 1.2 * cost_s))
    return Capacity(chunk_s, 4, 0, 4, costs=tuple(costs))


class Run:
    """A ladder that is sampled four times a second, over sessions whose misses follow from the load."""

    def __init__(self, chunk_s: float, wishes: tuple[int, ...] = (1,), *, small: bool = True) -> None:
        self.small = small
        self.wishes = wishes
        self.chunk_s = chunk_s
        self.missed_share: float | None = None
        self.lost_share = 0.0
        self.now = 0.0
        self.moves: list[tuple[float, Move]] = []
        self.ladder = Ladder(SERVER, capacity_of(chunk_s, small=small), steps_max=4, wish=wishes[0], now=0.0)

    @property
    def capacity(self) -> Capacity:
        return capacity_of(self.chunk_s, small=self.small)

    @property
    def load(self) -> float:
        return self.ladder.load(self.capacity, self.wishes)

    def sample(self) -> Move | None:
        self.now += SAMPLE_S
        due = round(self.ladder.rung.fps * len(self.wishes) * SAMPLE_S)
        share = max(0.0, 1 - 1 / self.load) if self.load > 1 else 0.0
        share = share if self.missed_share is None else self.missed_share
        lost = int(due * min(share, self.lost_share))
        move = self.ladder.decide(self.now, Signals(self.capacity, self.wishes, due, int(due * share), lost))
        if move is not None:
            self.moves.append((self.now, move))
        return move

    def go(self, seconds: float) -> Run:
        for _ in range(round(seconds / SAMPLE_S)):
            self.sample()
        return self


# --- the rungs


def test_the_ladder_gives_up_steps_then_size_then_frames_then_the_style() -> None:
    ladder = rungs(SERVER, steps_max=3, has_small=True)
    assert ladder == [
        Rung(3, False, 24),
        Rung(2, False, 24),
        Rung(1, False, 24),
        Rung(1, True, 24),
        *(Rung(1, True, fps) for fps in (20, 15, 12, 10, 8)),
        Rung(1, True, 24, camera=True),
    ]
    assert not any(rung.small or rung.light for rung in rungs(SERVER, steps_max=3, has_small=False))


def test_a_longer_way_round_a_ring_costs_latency_and_no_load() -> None:
    capacity, rung = capacity_of(0.1), Rung(1, False, 24)
    near, far = (Demand(replace(capacity, transit_s=transit_s), (1,), SERVER) for transit_s in (0.0, 0.2))
    assert far.latency_s(rung) == pytest.approx(near.latency_s(rung) + 0.2) and far.load(rung) == near.load(rung)
    assert near.is_good(rung, PROMISE_LOAD)
    # With the ring's way on top a chunk of two sessions is too late at any rate: the second is not let in.
    settings = SERVER.model_copy(update={"latency_budget_s": 0.45})
    assert Demand(capacity, (1, 1), settings).first_good([rung], PROMISE_LOAD * 2) is not None
    assert Demand(replace(capacity, transit_s=0.2), (1, 1), settings).first_good([rung], PROMISE_LOAD * 2) is None


def test_a_light_vae_stands_between_the_steps_and_the_size() -> None:
    ladder = rungs(SERVER, steps_max=2, has_small=True, has_light=True)
    light = [Rung(1, False, 24, light=True), Rung(1, True, 24, light=True)]
    assert ladder[:4] == [Rung(2, False, 24), Rung(1, False, 24), *light]
    assert all(rung.light and rung.small for rung in ladder[4:])


def test_an_engine_too_slow_for_its_vae_takes_the_light_one_and_goes_back_when_it_can() -> None:
    def capacity(chunk_s: float, *, light: bool = True) -> Capacity:
        costs = [ChunkCostAt(1, False, chunk_s, chunk_s), ChunkCostAt(1, False, 0.6 * chunk_s, chunk_s, light=True)]
        return Capacity(chunk_s, 4, 0, 4, costs=tuple(costs[: 1 + light]))

    ladder = Ladder(SERVER, capacity(0.1), steps_max=1, wish=1, now=0.0)
    full, light = Rung(1, False, 24), Rung(1, False, 24, light=True)
    assert ladder.rung == full
    now, seen = 0.0, []
    for chunk_s, seconds in ((0.2, 5), (0.1, 12)):
        for _ in range(round(seconds / SAMPLE_S)):
            now += SAMPLE_S
            if move := ladder.decide(now, Signals(capacity(chunk_s), (1,))):
                seen.append(move.target)
    assert seen == [light, full]
    # An engine that came back without it has another ladder: nobody is left on a rung that is none.
    slow = Ladder(SERVER, capacity(0.2), steps_max=1, wish=1, now=0.0)
    assert slow.rung == light
    slow.decide(1.0, Signals(capacity(0.2, light=False), (1,)))
    assert not slow.rung.light


@given(st.floats(0.01, 1.0), st.lists(st.integers(1, 4), min_size=1, max_size=8), st.booleans())
def test_every_rung_down_needs_no_more_of_the_engine(chunk_s: float, wishes: list[int], small: bool) -> None:
    capacity = capacity_of(chunk_s, small=small)
    demand = Demand(capacity, tuple(wishes), SERVER)
    loads = [demand.load(rung) for rung in rungs(SERVER, steps_max=4, has_small=small)]
    assert loads == sorted(loads, reverse=True) and loads[-1] == 0


def test_latency_is_the_filling_of_a_chunk_and_a_chunk_of_every_session() -> None:
    demand = Demand(capacity_of(0.1), (1, 2), SERVER)
    assert demand.chunks_s(Rung(4, False, 24)) == pytest.approx(0.1 + 0.17)
    assert demand.latency_s(Rung(1, True, 12)) == pytest.approx(3 / 12 + 0.112 + MARGIN_S)
    batch = SERVER.model_copy(update={"engine": EngineSettings(mode="batch")})
    held = replace(demand, settings=batch)
    assert held.latency_s(Rung(2, False, 24)) == pytest.approx(demand.latency_s(Rung(2, False, 24)) + 4 / 24)


# --- down


def test_groups_side_by_side_share_the_sessions_and_the_fullest_counts() -> None:
    full, two = capacity_of(0.1), replace(capacity_of(0.1), groups=2)
    rung = Rung(1, small=False, fps=24)
    for sessions, as_many in ((1, 1), (2, 1), (3, 2), (4, 2)):
        over_two, over_one = (
            Demand(capacity, (1,) * count, SERVER).chunks_s(rung)
            for capacity, count in ((two, sessions), (full, as_many))
        )
        assert over_two == pytest.approx(over_one)


def test_it_begins_where_one_session_can_stand() -> None:
    assert Run(0.1).ladder.rung == Rung(4, False, 24)
    assert Run(0.1, (4,)).ladder.rung == Rung(1, False, 24)
    assert Run(0.2).ladder.rung == Rung(1, True, 24)
    assert Run(0.2, small=False).ladder.rung.fps == 15
    assert not Run(5.0).ladder.rung.camera  # who comes may at least see it tried


@pytest.mark.parametrize(("small", "expected"), [(True, Rung(1, True, 15)), (False, Rung(1, False, 8))])
def test_an_engine_four_times_slower_is_answered_by_one_move_within_a_second(small: bool, expected: Rung) -> None:
    run = Run(0.1, small=small).go(20)
    assert run.moves == []
    run.chunk_s = 0.4
    run.go(1.0)
    ((_, move),) = run.moves
    assert move.target == run.ladder.rung == expected
    assert "400 ms a chunk, 167 ms are there" in move.reason
    run.go(8)
    assert len(run.moves) == 1 and run.load <= PROMISE_LOAD


def test_a_newcomer_lowers_all_at_once_and_all_rise_when_it_leaves() -> None:
    run = Run(0.1, small=False).go(5)
    run.wishes = (1, 1)
    assert run.sample() is not None
    assert run.ladder.rung == Rung(1, False, 15)
    assert "for each of 2 sessions" in run.ladder.reason
    run.go(20)
    run.wishes = (1,)
    run.go(CLEAN_S - 1)
    assert run.ladder.rung.fps == 15
    run.go(2)
    assert run.ladder.rung == Rung(4, False, 24)


def test_fewer_steps_are_given_up_before_size_and_only_by_those_who_wished_them() -> None:
    run = Run(0.06, (1, 1)).go(5)
    assert run.ladder.rung == Rung(4, False, 24) and not run.moves
    run.wishes = (1, 4)
    move = run.sample()
    assert move is not None and move.target == Rung(1, False, 24)
    # Steps that nobody wishes are no loss, and no move.
    run.wishes = (1, 1)
    run.sample()
    assert run.ladder.rung == Rung(4, False, 24) and len(run.moves) == 1


def test_misses_that_go_on_move_one_rung_though_the_load_is_light() -> None:
    run = Run(0.05).go(5)
    run.missed_share = 0.5
    run.go(1)
    ((_, move),) = run.moves
    assert move.target == Rung(1, True, 24) and "% of the frames of the last second came too late" in move.reason
    run.missed_share = 0.0
    run.go(CLEAN_S + 2)
    assert run.ladder.rung == Rung(4, False, 24)


def test_one_late_chunk_is_no_reason() -> None:
    run = Run(0.05).go(5)
    run.missed_share = 0.7
    run.sample()
    run.missed_share = 0.0
    run.go(5)
    assert run.moves == []


def test_one_costly_sample_is_no_reason() -> None:
    run = Run(0.1).go(5)
    run.chunk_s, run.missed_share = 0.3, 0.0
    run.sample()
    run.chunk_s = 0.1
    run.go(5)
    assert run.moves == []


def test_what_is_missed_while_the_engine_is_away_tells_nothing() -> None:
    run = Run(0.05).go(5)
    run.missed_share = 1.0
    run.sample()
    for _ in range(8):
        run.now += SAMPLE_S
        run.ladder.hold(run.now)
    run.sample()
    run.missed_share = 0.0
    run.go(2)
    assert run.moves == []


def test_a_smaller_size_is_chosen_where_fewer_frames_would_fill_a_chunk_too_slowly() -> None:
    demand = Demand(capacity_of(0.2), (1,), SERVER)
    slow = Rung(1, False, 15)
    assert demand.load(slow) <= PROMISE_LOAD
    narrow = SERVER.model_copy(update={"latency_budget_s": 0.4})
    assert not replace(demand, settings=narrow).is_good(slow, PROMISE_LOAD)
    assert replace(demand, settings=narrow).is_good(Rung(1, True, 24), PROMISE_LOAD)


# --- the camera


def test_the_camera_comes_when_nothing_else_is_in_time_and_is_left_by_trying() -> None:
    run = Run(0.1).go(5)
    run.chunk_s = 2.0
    run.go(1)
    assert run.ladder.rung.camera and "no other setting" in run.moves[-1][1].reason
    run.go(CLEAN_S + 1)
    assert run.moves[1][1].reason == "trying again" and not run.moves[1][1].target.camera
    run.go(300)
    # Each vain try doubles the wait for the next one.
    tries = [at for at, move in run.moves if move.reason == "trying again"]
    assert 3 <= len(tries) <= 6 and np.all(np.diff(np.diff(tries)) > 0)
    run.chunk_s = 0.1
    run.go(200)
    assert run.ladder.rung == Rung(4, False, 24)


def test_the_camera_comes_when_most_frames_of_the_last_rung_are_never_shown() -> None:
    run = Run(0.25, small=False).go(5)
    run.missed_share = run.lost_share = 0.9
    run.go(40)
    assert any(move.target.camera for _, move in run.moves)
    fps = [move.target.fps for _, move in run.moves if not move.target.camera and move.reason != "trying again"]
    assert fps == sorted(fps, reverse=True)


@pytest.mark.parametrize(("missed", "lost"), [(0.9, 0.0), (0.9, 0.4)])
def test_late_pictures_are_no_reason_for_the_camera_while_most_are_shown(missed: float, lost: float) -> None:
    run = Run(0.25, small=False).go(5)
    run.missed_share, run.lost_share = missed, lost
    run.go(60)
    assert not any(move.target.camera for _, move in run.moves)


def test_a_machine_that_did_something_else_for_a_second_is_no_reason_for_the_camera() -> None:
    run = Run(0.25, small=False).go(5)
    for stall_s, expected in ((1.25, False), (2.5, True)):
        run.missed_share = run.lost_share = 1.0
        run.go(stall_s)
        run.missed_share = run.lost_share = 0.0
        run.go(5)
        assert run.ladder.rung.camera is expected
    assert "far too late" in run.ladder.reason


def test_the_camera_comes_when_no_rung_is_in_time_for_seconds_and_pictures_are_late() -> None:
    """470 ms a chunk at the smaller size: at 8 fps, which the engine can follow, half of each chunk comes too late."""
    run = Run(0.1).go(5)
    for slow_s, expected in ((1.5, False), (5.0, True)):
        run.chunk_s, run.missed_share = 0.84, 0.5
        run.go(slow_s)
        run.chunk_s, run.missed_share = 0.1, None
        run.go(1)
        assert run.ladder.rung.camera is expected
    (first, _), *_, (last, move) = run.moves
    assert move.target.camera and run.moves[0][1].target.fps == 8 and last - first >= LAST_S


def test_a_rung_that_would_show_three_of_four_frames_is_none_to_be_given_up() -> None:
    """340 ms a chunk and no smaller size: 10 fps, the oldest frame of each chunk 0.64 s old and the others in time."""
    run = Run(0.1, small=False).go(5)
    run.chunk_s = 0.34
    run.go(20)
    assert [move.target for _, move in run.moves] == [Rung(1, False, 10)]


# --- hysteresis


disturbances = st.lists(
    st.tuples(
        st.floats(0.02, 1.5),
        st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple),
        st.sampled_from([None, 0.0, 0.04, 0.2, 0.8]),
        st.integers(1, 40),
        st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=25, deadline=None)
@given(disturbances)
def test_whatever_comes_there_is_one_move_in_three_seconds_and_it_goes_the_way_it_says(
    phases: list[tuple[float, tuple[int, ...], float | None, int, bool]],
) -> None:
    run = Run(0.1)
    for chunk_s, wishes, missed_share, samples, small in phases:
        run.chunk_s, run.wishes, run.missed_share, run.small = chunk_s, wishes, missed_share, small
        for _ in range(samples):
            if (move := run.sample()) is None:
                continue
            demand = Demand(run.capacity, run.wishes, SERVER)
            assert move.target == run.ladder.rung != move.origin and move.reason
            assert move.target in rungs(SERVER, steps_max=4, has_small=small)
            assert move.target.fps >= SERVER.min_fps
            rises = demand.load(move.target) > demand.load(move.origin)
            if rises and not move.origin.camera:
                assert demand.is_good(move.target, RISE_LOAD)
    times = [at for at, _ in run.moves]
    assert all(later - earlier >= MOVE_PERIOD_S for earlier, later in itertools.pairwise(times))


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0.02, 0.3),
    st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_a_constant_load_with_noise_moves_nobody_for_long(
    chunk_s: float, wishes: tuple[int, ...], small: bool, seed: int
) -> None:
    noise = np.random.default_rng(seed)
    run = Run(chunk_s, wishes, small=small)
    for _ in range(round(300 / SAMPLE_S)):
        run.chunk_s = chunk_s * noise.uniform(0.97, 1.03)
        run.missed_share = None if run.load > 1 else noise.uniform(0, 0.9 * MISSED_SHARE)
        run.sample()
    # A vain try to leave the camera is two moves.
    shows_camera = any(move.target.camera for _, move in run.moves)
    assert len(run.moves) <= (12 if shows_camera else 6)
    assert len([at for at, _ in run.moves if at > 150]) <= (4 if shows_camera else 1)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.02, 0.12), st.integers(1, 2), st.floats(1.2, 4.0))
def test_a_slow_down_is_one_move_to_a_rung_that_holds_and_the_way_back_is_whole(
    chunk_s: float, sessions: int, times: float
) -> None:
    run = Run(chunk_s, (1,) * sessions).go(15)
    before, moves = run.ladder.rung, len(run.moves)
    run.chunk_s = chunk_s * times
    run.go(1)
    if len(run.moves) > moves and not run.ladder.rung.camera:
        assert run.load <= STAY_LOAD or run.ladder.rung.fps == 8
    run.go(30)
    run.chunk_s = chunk_s
    run.go(4 * CLEAN_S)
    if Demand(run.capacity, run.wishes, SERVER).is_good(before, RISE_LOAD):
        assert run.ladder.rung == before
