"""`livebrush load`: what it makes of what it saw, what it sends, and a run against a server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import av
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import EngineSettings
from engine.fake import FakeEngine
from server.app import running_server
from server.cli import main
from server.decoding import Decoder
from server.load_clip import ClipTrack, EncodedClip, encode_clip, vp8
from server.load_figures import SentFrames, ServerClock, SessionFigures, fairness
from server.load_run import DEMO_CLIP, LoadError, LoadJob, check_target, run_load
from server.reassembly import EncodedFrame, is_vp8_key_frame
from server.settings import ServerSettings
from tests.e2e.serving import Server

STATS: dict[str, Any] = {"due": 0, "late": 0, "dropped": {}, "inside": 0, "agreed_fps": 24.0, "ttff_ms": 321.0}


def depayloaded(clip: EncodedClip, place: int) -> bytes:
    from aiortc.codecs import depayload

    return b"".join(depayload(vp8(), payload) for payload in clip.frames[place].payloads)


# --- figures


def test_the_clock_believes_the_sample_with_the_least_round_trip_of_the_last_half_minute() -> None:
    clock = ServerClock()
    assert clock.best is None
    clock.on_pong(10.0, 10.2, 110.15)
    clock.on_pong(11.0, 11.01, 111.005)
    clock.on_pong(12.0, 12.5, 112.1)
    assert clock.best == pytest.approx((0.01, 100.0))
    clock.on_pong(42.0, 42.1, 142.06)
    assert clock.best == pytest.approx((0.1, 100.01))


@given(lost=st.sets(st.integers(0, 119)), delays_s=st.lists(st.floats(0.002, 0.4), min_size=120, max_size=120))
def test_a_frame_is_known_by_its_index_whatever_was_lost_before_and_however_long_it_took(
    lost: set[int], delays_s: list[float]
) -> None:
    """Every thirtieth comes through at once: the way is free. Until then an age is never said too large."""
    sent, fps = SentFrames(), 30.0
    came: list[int] = []
    for number in range(120):
        sent.on_sent(number / fps)
    for number in range(120):
        is_free = number % 30 == 29
        if is_free or number not in lost:
            sent.note(len(came), number / fps + (0.002 if is_free else delays_s[number]), 0.001)
            came.append(number)
    for index, number in enumerate(came):
        found = sent.sent_at(index)
        assert found is not None and found >= number / fps - 1e-9
        if not lost & set(range(number + 1, number - number % 30 + 29)):
            assert found == pytest.approx(number / fps)


def test_losses_on_the_way_up_are_told_from_a_queue() -> None:
    sent, fps = SentFrames(), 30.0
    for number in range(400):
        sent.on_sent(number / fps)
    for index in range(100):
        sent.note(index, index / fps + 0.002, 0.001)
    assert sent.sent_at(99) == pytest.approx(99 / fps)
    # A queue of 200 ms: six more were sent, and it is still the same frame.
    for index in range(100, 130):
        sent.note(index, index / fps + 0.2, 0.001)
    sent.note(130, 130 / fps + 0.002, 0.001)
    assert sent.sent_at(129) == pytest.approx(129 / fps)
    # Ten were lost.
    for index in range(131, 390):
        sent.note(index, (index + 10) / fps + 0.002, 0.001)
    assert sent.sent_at(389) == pytest.approx(399 / fps) and sent.sent_at(131) == pytest.approx(141 / fps)
    assert sent.sent_at(10_000) is None and SentFrames().sent_at(0) is None


def seen(*, marks_first: bool = False) -> SessionFigures:
    """Two seconds at 10 fps: sent at n/10, arrived 10 ms later, released 50 ms later, received 20 ms after that."""
    figures = SessionFigures(ServerClock())
    figures.on_offer(-1.0)
    figures.on_answer(-0.9)
    figures.on_connected(-0.8)
    figures.clock.on_pong(-0.01, 0.0, 999.995)  # the server's clock reads 1000 more
    figures.on_stats(STATS | {"due": 5, "inside": 1}, 0.0)
    figures.begin(0.05)
    rows = []
    for number in range(20):
        figures.sent.on_sent(number / 10)
        rows.append([90 * number, number, 1000.01 + number / 10, 1000.06 + number / 10, int(number > 4)])
    if marks_first:
        figures.on_marks(rows)
    for number in range(20):
        figures.on_picture(90 * number, number / 10 + 0.08)
    if not marks_first:
        figures.on_marks(rows)
    return figures


@pytest.mark.parametrize("marks_first", [False, True])
def test_ages_join_pictures_and_marks_in_either_order(marks_first: bool) -> None:
    found = seen(marks_first=marks_first).figures(2.05)
    assert found["age_p50_s"] == pytest.approx(0.08) and found["age_p99_s"] == pytest.approx(0.08)
    assert found["server_age_p95_s"] == pytest.approx(0.05)
    assert found["clock_error_s"] == 0.005 and found["losses"] == {}
    assert found["fps"] == 10.0 and found["restyled_share"] == 0.75
    assert found["interval_p50_s"] == found["interval_p99_s"] == pytest.approx(0.1)
    assert found["ttff_s"] == pytest.approx(1.58) and found["answer_s"] == pytest.approx(0.1)


def test_one_clock_serves_all_sessions_and_without_it_no_age_is_claimed() -> None:
    clock = ServerClock()
    mute = SessionFigures(clock)
    mute.begin(0.0)
    mute.sent.on_sent(0.5)
    mute.on_picture(1, 0.8)
    mute.on_marks([[1, 0, 1000.6, 1000.7, 1]])
    found = mute.figures(1.0)
    assert found["age_p50_s"] is None and found["losses"] == {"ages_unknown": 1} and found["server_age_p50_s"] == 0.1
    clock.on_pong(1.0, 1.01, 1001.005)
    mute.sent.on_sent(1.5)
    mute.on_picture(2, 1.8)
    mute.on_marks([[2, 1, 1001.6, 1001.7, 1]])
    assert mute.figures(2.0)["age_p50_s"] == pytest.approx(0.3)


def test_the_deadline_miss_rate_is_of_the_measured_time_and_of_settled_frames() -> None:
    figures = seen()
    after = STATS | {"due": 107, "inside": 3, "late": 6, "dropped": {"deadline": 3, "stale": 1}}
    after |= {"rung_moves": {"down": 2, "up": 0}, "ttff": {"answer_ms": 20.0, "engine_ms": 301.0}}
    figures.on_stats(after, 2.0)
    figures.on_stats(STATS | {"due": 50}, 2.0)  # overtaken
    found = figures.figures(2.05)
    assert (found["due"], found["late"], found["dropped"]) == (102, 6, {"deadline": 3, "stale": 1})
    assert found["dmr"] == 0.1 and found["losses"] == {"stats_overtaken": 1}
    assert found["rung_moves"] == {"down": 2}
    assert found["server_ttff_s"] == 0.321 and found["server_ttff_stages_s"] == {"answer_s": 0.02, "engine_s": 0.301}
    assert figures.figures(20.0)["dmr"] is None  # its figures stopped coming


def test_freezes_are_counted_and_the_silent_end_is_one() -> None:
    figures = seen()
    figures.on_picture(10**6, 2.7)
    found = figures.figures(2.9)
    assert found["freezes"] == 1 and found["longest_gap_s"] == pytest.approx(0.72)
    assert figures.figures(3.9)["freezes"] == 2
    nothing = SessionFigures(ServerClock())
    nothing.begin(0.0)
    found = nothing.figures(1.0)
    assert found["freezes"] == 1 and found["fps"] == 0.0 and found["dmr"] is found["age_p50_s"] is None


def test_what_waits_for_its_other_half_is_bounded_and_counted() -> None:
    figures = SessionFigures(ServerClock())
    figures.begin(0.0)
    for number in range(2000):
        figures.on_picture(2 * number, number / 30)
        figures.on_marks([[2 * number + 1, number, 0.0, 0.0, 1]])
    losses = figures.figures(70.0)["losses"]
    assert losses == {"pictures_without_mark": 2000 - 1024, "marks_without_picture": 2000 - 1024}


def test_fairness_names_the_worst_and_the_least_served() -> None:
    sessions: list[dict[str, Any]] = [{"dmr": 0.02, "fps": 24.0}, {"dmr": 0.0, "fps": 16.0}, {"dmr": None, "fps": 20.0}]
    assert fairness(sessions) == {"worst_dmr": 0.02, "mean_dmr": 0.01, "share_min": 0.8, "share_max": 1.2}
    assert set(fairness([]).values()) == {None}


# --- the camera


@pytest.fixture(scope="module")
def clip() -> EncodedClip:
    return encode_clip(DEMO_CLIP, 12.0, 96)


def test_the_clip_runs_at_the_asked_rate_with_a_key_frame_a_second(clip: EncodedClip) -> None:
    assert (clip.width, clip.height, clip.fps) == (128, 96, 12.0)
    assert len(clip.frames) == pytest.approx(10.47 * 12, abs=1)
    assert clip.key_frames == list(range(0, len(clip.frames), 12))
    keys = [place for place in range(len(clip.frames)) if is_vp8_key_frame(depayloaded(clip, place))]
    assert keys == clip.key_frames
    assert 20_000 < clip.bitrate < 1_600_000


async def test_the_clip_goes_on_at_its_beginning_and_a_key_frame_can_be_asked_for(clip: EncodedClip) -> None:
    counters: Counter[str] = Counter()
    sent: list[float] = []
    track = ClipTrack(EncodedClip(clip.frames[:36], 1000.0, clip.width, clip.height), 2, sent.append, counters)
    decoder = Decoder(vp8(), 10**6)
    taken, ticks = [], [-1]
    for number in range(40):
        if number == 30:
            track.ask_key_frame()
            track.ask_key_frame()  # too soon after the first
        frame, at = await track.next()
        taken.append(clip.frames.index(frame))
        assert at >= ticks[-1]
        ticks.append(at)
        pictures = decoder.decode(EncodedFrame(depayloaded(clip, taken[-1]), at, 0.0))
        assert all(isinstance(picture, av.VideoFrame) and picture.width == 128 for picture in pictures) and pictures
    assert taken[:30] == [*range(24, 36), *range(18)]
    assert taken[30:] == list(range(24, 34)) and counters["key_frames_asked"] == 1
    assert len(sent) == 40


# --- runs


REPORT_KEYS = {
    *("url", "seconds", "asked", "sessions", "refused", "refused_ms_max", "refusals"),
    *("fairness", "camera", "generator", "interrupted"),
}
SESSION_KEYS = {"fps", "dmr", "ttff_s", "age_p50_s", "age_p95_s", "interval_p99_s", "freezes", "dropped", "notices"}


def test_two_sessions_are_measured_and_the_third_is_refused_and_told_when_to_come_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Server(tmp_path / "log", engine="fake", options=("--size", "64x64"), LIVEBRUSH_MAX_SESSIONS="2") as server:
        asked = ["load", "--sessions", "3", "--seconds", "3", "--fps", "24", "--url", server.url]
        assert main([*asked, "--ramp", "0.5", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert server.capacity()["open"] == 0, "every session was closed with a goodbye"
        assert server.ended() == {"closed": 2}
    assert report.keys() == REPORT_KEYS and report["asked"] == 3 and not report["interrupted"]
    assert [session["session"] for session in report["sessions"]] == [0, 1]
    for session in report["sessions"]:
        assert session.keys() >= SESSION_KEYS and session["errors"] == []
        assert session["fps"] > 5 and session["due"] > 0 and 0.0 <= session["dmr"] <= 1.0
        assert session["restyled_share"] > 0.5
        assert 0 < session["answer_s"] < session["connect_s"] and session["answer_s"] < session["ttff_s"]
        # From end to end is longer than the server's part of it.
        assert 0 < session["server_age_p50_s"] < session["age_p50_s"] <= session["age_p95_s"]
        assert session["interval_p50_s"] <= session["interval_p95_s"] <= session["interval_p99_s"]
    assert 0 <= report["generator"]["machine_cpu_share"] <= 1 and report["generator"]["cpu_share_of_a_core"] > 0
    assert 0 < report["fairness"]["share_min"] <= 1 <= report["fairness"]["share_max"]
    assert report["refused"] == 1 and report["refused_ms_max"] > 0
    refusal = report["refusals"][0]
    assert (refusal["session"], refusal["status"], refusal["code"]) == (2, 503, "full")
    assert refusal["retry_after_s"] > 0 and "seats" in refusal["message"]


async def test_an_interrupt_ends_early_with_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ServerSettings(port=0, engine_kind="fake", engine=EngineSettings(width=64, height=64), max_fps=24)
    async with running_server(settings, FakeEngine(64, 64, delay_s=0.01)) as (_, port):
        url = f"http://127.0.0.1:{port}"

        def interrupt(line: str) -> None:
            if line.startswith("measuring"):
                asyncio.get_running_loop().call_later(1.5, os.kill, os.getpid(), signal.SIGINT)

        job = LoadJob(url, sessions=1, seconds=600.0, fps=24.0, warmup_s=0.0, decode="all")
        report = await run_load(job, interrupt)
        async with aiohttp.ClientSession() as http, http.get(url + "/api/v1/capacity") as response:
            assert (await response.json())["open"] == 0
    assert report["interrupted"] and 1.0 < report["seconds"] < 100.0
    session = report["sessions"][0]
    assert session["pictures"] > 0 and session["pictures_decoded"] > 0 and session["errors"] == []


async def test_a_server_that_ends_is_an_error_of_its_sessions_and_not_a_good_figure() -> None:
    settings = ServerSettings(port=0, engine_kind="fake", engine=EngineSettings(width=64, height=64), max_fps=24)
    measuring = asyncio.Event()
    async with running_server(settings, FakeEngine(64, 64, delay_s=0.01)) as (_, port):
        job = LoadJob(f"http://127.0.0.1:{port}", sessions=1, seconds=600.0, fps=24.0, warmup_s=0.0)
        run = asyncio.create_task(run_load(job, lambda line: measuring.set() if "measuring" in line else None))
        await measuring.wait()
    report = await run
    assert report["seconds"] < 100.0 and "closed" in report["sessions"][0]["errors"][0]


def test_a_wrong_parameter_is_told_with_the_servers_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Server(tmp_path / "log", engine="fake", options=("--size", "64x64")) as server:
        assert main(["load", "--sessions", "1", "--seconds", "1", "--url", server.url, "--steps", "9"]) == 0
    out = capsys.readouterr().out
    assert "refused: 1 (bad_request: " in out and "steps" in out


@pytest.mark.parametrize("host", ["192.0.2.7", "[2001:db8::1]"])
def test_a_target_on_another_machine_is_refused_with_the_cure(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", "--sessions", "1", "--seconds", "1", "--url", f"http://{host}:8080"]) == 2
    said = capsys.readouterr().err
    assert host.strip("[]") in said and "--allow-remote" in said


async def test_what_is_on_this_machine_passes_by_any_name() -> None:
    for url in ("http://localhost:1", "http://127.0.0.1", "http://127.3.2.1:80", "http://[::1]:8080"):
        await check_target(url)
    with pytest.raises(LoadError, match="check the name"):
        await check_target("http://no-such-name.invalid:80")


def test_a_server_that_is_not_there_is_told_in_clear_words(
    unused_tcp_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{unused_tcp_port}"
    assert main(["load", "--sessions", "1", "--seconds", "1", "--url", url]) == 1
    said = capsys.readouterr().err
    assert f"no server at {url}" in said and "refused" in said and "livebrush serve" in said


@pytest.mark.parametrize(
    ("option", "value", "bound"),
    [
        ("--sessions", "0", "between 1 and 256"),
        ("--seconds", "0", "above 0"),
        ("--seconds", "nan", "above 0"),
        ("--fps", "300", "between 1 and 60"),
        ("--url", "ftp://here", "no address"),
        ("--url", "http://here:0", "no address"),
        ("--url", "http://here:99999", "no address"),
    ],
)
def test_misuse_names_the_bound(option: str, value: str, bound: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["load", "--sessions", "1", "--seconds", "1", option, value])
    assert stopped.value.code == 2 and bound in capsys.readouterr().err
