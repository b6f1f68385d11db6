"""The server process's own limit: what a frame costs it, who is refused for it, and how frames are taken."""

import asyncio
import itertools
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.api import Capacity, ChunkCostAt
from engine.config import EngineSettings
from server.admission import seats
from server.event_loop import BusyLoop, IdleSelector, busy_s
from server.host import SESSION_FRAMES, FrameCap, Host, HostMeter
from server.ladder import CLEAN_S, MOVE_PERIOD_S, PROMISE_LOAD
from server.settings import ServerSettings

SERVER = ServerSettings(max_fps=24, min_fps=8, max_sessions=8, engine=EngineSettings(max_streams=8))
FAST = Capacity(0.001, 8, 0, 4, costs=(ChunkCostAt(1, False, 0.001, 0.001),))


def test_what_a_frame_costs_is_learned_and_a_start_without_frames_tells_nothing() -> None:
    meter = HostMeter()
    meter.sample(0.0, cpu_s=10.0, loop_s=5.0, frames=0, sessions=0, busy_share=0.5, cores=4)
    meter.sample(2.0, cpu_s=11.0, loop_s=5.5, frames=10, sessions=2, busy_share=0.5, cores=4)
    assert meter.host == Host()
    host = meter.sample(4.0, cpu_s=12.0, loop_s=5.7, frames=60, sessions=2, busy_share=0.25, cores=4)
    # One second of CPU and 0.2 of the loop for 50 frames of two sessions; half a core used and three idle.
    frames = 50 + 2 * 2 * SESSION_FRAMES
    assert (host.cpu_s, host.loop_s, host.cores) == pytest.approx((1 / frames, 0.2 / frames, 3.5))
    busy = HostMeter()
    for second in (0, 1):
        host = busy.sample(second, cpu_s=second, loop_s=0, frames=50 * second, sessions=2, busy_share=1.0, cores=8)
    assert host.cores == 4  # beside others it still has its share


def test_fewer_frames_take_less_from_a_session_than_frames() -> None:
    """What 4 sessions were measured to take at 24 and at 8 fps, cameras of 30: 0.54 and 0.33 of a core."""
    meter = HostMeter()
    for second in (0, 2):
        host = meter.sample(
            second, cpu_s=0.54 * second, loop_s=0.0, frames=4 * 24 * second, sessions=4, busy_share=0.5, cores=2
        )
    at_full, at_least = host.cores * host.load(24, 4), host.cores * host.load(8, 4)
    assert at_full == pytest.approx(0.54) and at_least == pytest.approx(0.33, rel=0.1)


def test_an_offer_that_would_starve_the_process_finds_no_seat() -> None:
    assert seats(FAST, SERVER) == 8
    assert seats(FAST, SERVER, Host(cpu_s=0.01, cores=1.0)) == 3  # 8 frames a second and the session take 0.24 of it
    assert seats(FAST, SERVER, Host(cpu_s=0.01, cores=4.0)) == 8
    assert seats(FAST, SERVER, Host(loop_s=0.005, cores=64.0)) == 5  # one loop, however many cores
    assert seats(FAST, SERVER, Host(cpu_s=5.0)) == 1
    assert seats(Capacity(0.0, 8, 0, 4), SERVER, Host(cpu_s=0.01)) == 3  # whatever is known of the engine


def test_frames_are_taken_at_once_and_come_back_after_a_while_with_room() -> None:
    cap = FrameCap(SERVER)
    busy, idle = Host(cpu_s=0.01), Host(cpu_s=0.0025)
    assert cap.decide(0.0, busy, 1) == 24  # 0.4 of the core
    assert cap.decide(1.0, busy, 3) == 12  # 24 would be 1.2 of it, 15 still 0.93
    assert "3 sessions needs 120%" in cap.reason
    assert cap.decide(2.0, idle, 3) == 12
    assert cap.decide(2.0 + CLEAN_S / 2, idle, 3) == 12
    assert cap.decide(2.0 + CLEAN_S, idle, 3) == 24
    # A rate below the least is none, however little there is.
    assert FrameCap(SERVER).decide(0.0, Host(cpu_s=9.0), 4) == 8


def test_misses_are_laid_to_whichever_is_busier() -> None:
    host = Host(cpu_s=0.01)
    assert host.is_to_blame(24, 2, engine_load=0.3) and not host.is_to_blame(24, 2, engine_load=0.9)
    # One that is half idle makes nobody wait, whatever the engine does.
    assert not host.is_to_blame(24, 1, engine_load=0.0)
    assert not Host().is_to_blame(24, 64, engine_load=0.0)


def test_frames_missed_for_the_processs_sake_take_frames_one_rate_a_time() -> None:
    cap, host = FrameCap(SERVER), Host(cpu_s=0.006)
    assert cap.decide(0.0, host, 3, due=18, missed=2) == 24  # once is no reason
    assert cap.decide(0.5, host, 3, due=18, missed=2) == 20
    assert "11% of the frames" in cap.reason
    assert cap.decide(1.0, host, 3, due=18, missed=9) == 20
    for sample in range(1, 40):
        fps = cap.decide(1.0 + 0.25 * sample, host, 3, due=6, missed=sample % 2)
        assert fps == (20 if sample < 10 else 15 if sample < 22 else 12 if sample < 34 else 10)
    # With room and without misses it is the highest again, after a while.
    assert cap.decide(20.0, host, 3, due=10) == 10
    assert cap.decide(20.0 + CLEAN_S, host, 3, due=10) == 24


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 0.2), st.integers(0, 8)), min_size=1, max_size=200))
def test_whatever_comes_the_rate_is_one_there_is_and_moves_seldom(samples: list[tuple[float, int]]) -> None:
    cap, moves, before = FrameCap(SERVER), [], 24.0
    for sample, (cpu_s, sessions) in enumerate(samples):
        now, host = 0.25 * sample, Host(cpu_s=cpu_s)
        fps = cap.decide(now, host, sessions)
        assert SERVER.min_fps <= fps <= SERVER.max_fps
        if fps != before:
            moves.append(now)
            assert fps < before or host.load(fps, sessions) <= PROMISE_LOAD
            before = fps
    assert all(later - earlier >= MOVE_PERIOD_S for earlier, later in itertools.pairwise(moves))


def spin(seconds: float) -> None:
    """Python's own work of so many CPU seconds, which needs its lock all the time."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_a_loop_is_idle_while_it_waits_and_no_longer_than_it_wanted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    waits = iter([(0.5, 0.5), (1.0, 0.25), (0.5, 2.0), (0.0, 0.125), (None, 4.0)])

    def wait(selector: object, timeout: float | None) -> list[object]:
        expected, took = next(waits)
        assert timeout == expected
        now[0] += took
        return []

    monkeypatch.setattr("selectors.DefaultSelector.select", wait)
    selector = IdleSelector(lambda: now[0])
    idle = [0.0]
    for timeout in (0.5, 1.0, 0.5, 0.0, None):
        selector.select(timeout)
        idle.append(selector.idle_s)
        now[0] += 1.0  # work
    assert [after - before for before, after in itertools.pairwise(idle)] == [0.5, 0.25, 0.5, 0.0, 4.0]


async def test_a_loop_that_does_not_count_tells_its_threads_cpu_time() -> None:
    before = time.thread_time()
    assert before <= busy_s() <= time.thread_time()


def test_a_loop_that_threads_keep_from_pythons_lock_is_busy_though_it_uses_little_cpu() -> None:
    async def work() -> tuple[float, float]:
        before = busy_s(), time.thread_time()
        for _ in range(5):
            spin(0.01)
            await asyncio.sleep(0.01)
        return busy_s() - before[0], time.thread_time() - before[1]

    stop = threading.Event()

    def hold() -> None:
        while not stop.is_set():
            spin(0.01)

    threads = [threading.Thread(target=hold) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        with asyncio.Runner(loop_factory=BusyLoop) as runner:
            busy, cpu_s = runner.run(work())
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert busy > 2 * cpu_s
