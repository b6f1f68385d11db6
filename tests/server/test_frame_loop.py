"""The pure parts of a session: rate gate, chunks, pacer, presenter, acknowledgements, admission, figures."""

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.api import Capacity, StreamParams
from server import control
from server.acks import Ack, AckBook
from server.admission import agreed_fps, seats
from server.ingest import ChunkAssembler, RateGate, to_rgb
from server.metrics import ServerMetrics, SessionMetrics, quantile
from server.pacer import MAX_CHUNKS, Pacer
from server.presenter import FADE_FRAMES, Picture, Presenter, View
from server.settings import ServerSettings

GREY = np.full((8, 8, 3), 100, np.uint8)
WHITE = np.full((8, 8, 3), 200, np.uint8)


# --- ingest


@pytest.mark.parametrize(("camera", "agreed", "expected"), [(30, 24, 24), (30, 15, 15), (30, 30, 30), (20, 24, 20)])
def test_the_gate_thins_evenly_to_the_agreed_rate(camera: int, agreed: int, expected: int) -> None:
    gate = RateGate(agreed)
    admitted = [i / camera for i in range(camera * 20) if gate.admit(i / camera)]
    assert len(admitted) / 20 == pytest.approx(expected, rel=0.03)
    gaps = np.diff(admitted)
    assert gaps.max() - gaps.min() <= 1.01 / camera


def test_a_jittery_camera_at_the_agreed_rate_loses_nothing() -> None:
    gate, random = RateGate(24), np.random.default_rng(0)
    instants = [i / 24 + random.uniform(-0.004, 0.004) for i in range(480)]
    assert sum(map(gate.admit, instants)) >= 475


def test_a_chunk_is_due_with_its_oldest_frame_and_the_first_holds_one() -> None:
    assembler = ChunkAssembler(4, 0.5)
    chunks = [assembler.push(GREY, index=10 + i, arrived_at=float(i)) for i in range(9)]
    first, second, third = (chunk for chunk in chunks if chunk is not None)
    assert (first.frame_indices, second.frame_indices) == ((10,), (11, 12, 13, 14))
    assert (second.captured_at, second.deadline) == ((1.0, 2.0, 3.0, 4.0), 1.5)
    assert third.frames.shape == (4, 8, 8, 3) and (first.index, second.index, third.index) == (0, 1, 2)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (320, 180), (64, 64), (100, 30)])
def test_any_camera_size_becomes_the_centre_at_the_engines_size(size: tuple[int, int]) -> None:
    width, height = size
    picture = np.zeros((height, width, 3), np.uint8)
    picture[height // 2 - 4 : height // 2 + 4, width // 2 - 4 : width // 2 + 4] = 255
    rgb = to_rgb(av.VideoFrame.from_ndarray(picture, format="rgb24"), 64, 64)
    assert rgb.shape == (64, 64, 3) and rgb.dtype == np.uint8
    rows, columns = np.nonzero(rgb[..., 0] >= rgb.max() // 2)
    assert abs(rows.mean() - 31.5) < 1.5 and abs(columns.mean() - 31.5) < 1.5


# --- pacer


def play(pacer: Pacer[int], until: float, now: float) -> list[tuple[float, int]]:
    """Release on a 1 ms clock from `now` to `until`."""
    released = []
    while now < until:
        while (due := pacer.due_at()) is not None and due <= now:
            released.append((now, pacer.pop(now)))
        now += 0.001
    return released


def test_chunks_of_four_come_out_evenly() -> None:
    pacer: Pacer[int] = Pacer(24)
    random = np.random.default_rng(1)
    released: list[tuple[float, int]] = []
    now = 0.0
    for chunk in range(60):
        arrives = chunk * 4 / 24 + random.uniform(0, 0.015)
        released += play(pacer, arrives, now)
        now = max(now, arrives)
        assert pacer.push([4 * chunk + i for i in range(4)], now) == []
    assert [picture for _, picture in released] == list(range(len(released)))
    gaps = np.diff([at for at, _ in released])[40:]
    assert np.abs(gaps - 1 / 24).max() < 1 / 24  # jitter below one frame interval
    assert np.median(gaps) == pytest.approx(1 / 24, abs=0.004)
    assert len(pacer) <= 4


def test_a_slow_engine_slows_the_picture_evenly_instead_of_stuttering() -> None:
    pacer: Pacer[int] = Pacer(24)
    released: list[tuple[float, int]] = []
    now = 0.0
    for chunk in range(40):
        arrives = chunk * 4 / 16
        released += play(pacer, arrives, now)
        now = max(now, arrives)
        pacer.push([0] * 4, now)
    gaps = np.diff([at for at, _ in released])[80:]
    assert np.median(gaps) == pytest.approx(1 / 16, abs=0.006) and gaps.max() < 2 / 16


@given(st.lists(st.floats(0, 0.3), min_size=1, max_size=40))
def test_the_pacer_never_holds_more_than_two_chunks_and_keeps_order(waits: list[float]) -> None:
    pacer: Pacer[int] = Pacer(24)
    now, shown, lost = 0.0, [], []
    for chunk, wait in enumerate(waits):
        shown += [picture for _, picture in play(pacer, now + wait, now)]
        now += wait
        lost += pacer.push([4 * chunk + i for i in range(4)], now)
        assert len(pacer) <= MAX_CHUNKS * 4
    shown += [picture for _, picture in play(pacer, now + 5, now)]
    assert shown == sorted(shown) and sorted(shown + lost) == list(range(4 * len(waits)))


# --- presenter


def test_a_warm_server_shows_the_restyled_picture_first() -> None:
    presenter = Presenter()
    frame = presenter.present(Picture(0, 0.0, GREY, WHITE))
    assert frame.kind == 1 and np.array_equal(frame.rgb, WHITE) and presenter.view is View.RESTYLED


def test_after_the_camera_the_restyled_picture_fades_in() -> None:
    presenter = Presenter()
    assert presenter.present(Picture(0, 0.0, GREY)).kind == 0
    values = [int(presenter.present(Picture(i, 0.0, GREY, WHITE)).rgb[0, 0, 0]) for i in range(FADE_FRAMES + 1)]
    assert values == sorted(values) and 100 < values[0] < 120 and values[-1] == 200


def test_bypass_acts_at_the_next_picture_both_ways() -> None:
    presenter = Presenter(bypass=True)
    assert presenter.present(Picture(0, 0.0, GREY, WHITE)).rgb is GREY
    presenter.bypass = False
    assert presenter.present(Picture(1, 0.0, GREY, WHITE)).rgb is WHITE


# --- acknowledgements


def test_an_ack_names_the_first_frame_that_shows_it_or_none() -> None:
    book = AckBook()
    book.add(1, revision=1, now=0.0)
    book.add(2, revision=2, now=0.0)
    assert book.shown(50, revision=0) == []
    assert book.shown(54, revision=1) == [Ack(1, 54)]
    assert book.expired(1.9) == [] and book.expired(2.1) == [Ack(2, None)]
    assert book.clear() == []


# --- admission


def test_rates_are_shared_evenly_and_noise_moves_nobody() -> None:
    settings = ServerSettings(max_fps=24)
    cost = Capacity(chunk_cost_s=0.1, max_streams=4, open_streams=0, chunk_frames=4)
    assert [agreed_fps(cost, n, settings) for n in (1, 2, 3, 4)] == [24, 15, 10, 8]
    slower = Capacity(0.15, 4, 0, 4)
    assert agreed_fps(slower, 1, settings, current=24) == 24
    assert agreed_fps(slower, 1, settings, current=20) == 20
    assert agreed_fps(Capacity(0.5, 4, 0, 4), 4, settings) == settings.min_fps
    assert seats(cost, settings) == 4 and seats(slower, settings) == 2 and seats(Capacity(9, 4, 0, 4), settings) == 1


# --- control


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "message"),
        ("{", "not JSON"),
        ('{"v":1,"id":1,"type":"params","strength":2}', "less than or equal to 1"),
        ('{"v":1,"id":1,"type":"params","strength":NaN}', "finite"),
        ('{"v":1,"id":1,"type":"params","steps":"1"}', "integer"),
        ('{"v":2,"id":1,"type":"bye"}', "v"),
        ('{"v":1,"id":1,"type":"params","path":"/etc/passwd"}', "Extra inputs"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_broken_messages_are_explained(text: str, words: str) -> None:
    with pytest.raises(control.ControlError, match=words):
        control.parse(text)


def test_params_change_only_what_they_name() -> None:
    message = control.parse('{"v":1,"id":1,"type":"params","steps":2}')
    assert isinstance(message, control.Params)
    before = StreamParams(prompt="neon", strength=0.5)
    assert message.applied_to(before) == StreamParams(prompt="neon", strength=0.5, steps=2)


def test_the_rate_limit_allows_a_burst_then_the_rate() -> None:
    bucket = control.TokenBucket(20, 40)
    assert sum(bucket.take(0.0) for _ in range(100)) == 40
    assert sum(bucket.take(1.0) for _ in range(100)) == 20


# --- figures


def test_on_time_counts_late_and_dropped_frames_against_those_due() -> None:
    metrics = SessionMetrics(ServerMetrics(), offered_at=0.0, latency_budget_s=0.5)
    for i in range(100):
        metrics.on_arrival(i / 30, admitted=i < 80)
    metrics.on_dropped(3.0, "engine", 4)
    metrics.on_release(3.0, 2.8, restyled=True)
    metrics.on_release(3.1, 2.5, restyled=True)
    assert (metrics.due, metrics.late, metrics.thinned, metrics.ttff_s) == (80, 1, 20, 3.0)
    assert metrics.on_time() == pytest.approx(75 / 80)
    assert metrics.stats()["dropped"] == {"engine": 4}


def test_quantiles() -> None:
    assert quantile([], 0.5) is None
    assert (quantile([3, 1, 2], 0.5), quantile(range(1, 101), 0.95)) == (2, 95)
