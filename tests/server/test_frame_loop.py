"""The pure parts of a session: rate gate, chunks, pacer, presenter, acknowledgements, admission, figures."""

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest

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


def test_a_first_chunk_of_five_is_followed_by_chunks_of_four() -> None:
    assembler = ChunkAssembler(4, 0.5, first_chunk_frames=5)
    chunks = [assembler.push(GREY, index=i, arrived_at=i / 16) for i in range(13)]
    made = [chunk for chunk in chunks if chunk is not None]
    assert [chunk.frame_indices for chunk in made] == [(0, 1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12)]
    assert [len(chunk.frames) for chunk in made] == [5, 4, 4] and made[1].deadline == 5 / 16 + 0.5


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


@pytest.mark.parametrize(("camera_fps", "shown_fps"), [(30, 16), (16, 16), (10, 10)])
def test_sixteen_a_second_in_chunks_of_a_quarter_second_come_out_evenly(camera_fps: float, shown_fps: float) -> None:
    """The whole way of a model with a first chunk of five, for cameras faster, as fast and slower than its rate."""
    gate, assembler = RateGate(16), ChunkAssembler(4, 0.5, first_chunk_frames=5)
    pacer: Pacer[int] = Pacer(16)
    random = np.random.default_rng(3)
    released: list[tuple[float, int]] = []
    now, admitted = 0.0, 0
    for frame in range(round(30 * camera_fps)):
        arrived_at = frame / camera_fps
        if not gate.admit(arrived_at):
            continue
        admitted += 1
        if chunk := assembler.push(GREY, index=frame, arrived_at=arrived_at):
            back_at = arrived_at + 0.12 + random.uniform(0, 0.02)
            released += play(pacer, back_at, now)
            now = max(now, back_at)
            assert pacer.push(list(chunk.frame_indices), now) == []
    assert admitted / 30 == pytest.approx(shown_fps, rel=0.02)
    assert [index for _, index in released] == sorted({index for _, index in released})
    gaps = np.diff([at for at, _ in released])[40:]
    # The gate thins a camera of 30 to 16 unevenly by less than a camera frame.
    assert np.median(gaps) == pytest.approx(1 / shown_fps, abs=0.01)
    assert gaps.max() < 2 / shown_fps
    assert len(pacer) <= 5


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


def test_a_withheld_picture_is_the_camera_and_the_next_one_fades_back() -> None:
    presenter = Presenter()
    presenter.present(Picture(0, 0.0, GREY, WHITE))
    frame = presenter.present(Picture(1, 0.0, GREY, withheld=True))
    assert frame.rgb is GREY and (frame.kind, str(presenter.view)) == (0, "withheld")
    back = presenter.present(Picture(2, 0.0, GREY, WHITE))
    assert str(presenter.view) == "fading" and 100 < int(back.rgb[0, 0, 0]) < 120


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
    assert book.shown(50, revision=0, chunk=11) == []
    assert book.shown(54, revision=1, chunk=12) == [Ack(1, 54, 12)]
    assert book.expired(1.9) == [] and book.expired(2.1) == [Ack(2, None)]
    assert book.clear() == []


def test_while_pictures_flow_an_ack_waits_for_slow_words_and_no_longer_than_a_minute() -> None:
    book = AckBook()
    book.add(1, revision=1, now=0.0)
    assert book.expired(30.0, released_at=29.9) == []
    assert book.shown(500, revision=1, chunk=120) == [Ack(1, 500, 120)]
    book.add(2, revision=2, now=40.0)
    assert book.expired(43.0, released_at=40.5) == [Ack(2, None)]
    book.add(3, revision=3, now=50.0)
    assert book.expired(110.1, released_at=110.0) == [Ack(3, None)]


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
        ('{"v":1,"id":1,"type":"params","blend":[{"text":"a","weight":0}]}', "greater than 0"),
        (
            '{"v":1,"id":1,"type":"params","blend":[{"text":"a"},{"text":"a"},{"text":"a"},{"text":"a"},{"text":"a"}]}',
            "4",
        ),
        ('{"v":1,"id":1,"type":"params","transition_s":31}', "less than or equal to 30"),
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


def test_a_blend_replaces_the_prompt_and_a_prompt_the_blend() -> None:
    mix = control.parse(
        '{"v":1,"id":1,"type":"params","blend":[{"text":"neon","weight":3},{"text":"ink"}],"transition_s":2}'
    )
    assert isinstance(mix, control.Params)
    mixed = mix.applied_to(StreamParams(prompt="watercolor"))
    assert [(prompt.text, prompt.weight) for prompt in mixed.prompts] == [("neon", 3.0), ("ink", 1.0)]
    one = control.parse('{"v":1,"id":2,"type":"params","prompt":"ink wash","recache":true}')
    assert isinstance(one, control.Params)
    assert one.applied_to(mixed) == StreamParams(prompt="ink wash", recache=True)
    shown = control.shown_params(mixed, 2.0)
    assert shown == {
        "prompt": "watercolor",
        "blend": [{"text": "neon", "weight": 3.0}, {"text": "ink", "weight": 1.0}],
        "transition_s": 2.0,
        "recache": False,
        "strength": 1.0,
        "steps": 1,
        "seed": 0,
    }


@pytest.mark.parametrize(
    ("transition_s", "fps", "chunks"), [(0.0, 24, 0), (2.0, 16, 8), (2.0, 24, 12), (0.01, 16, 1), (30.0, 60, 240)]
)
def test_a_transition_is_counted_in_chunks_of_the_agreed_rate(transition_s: float, fps: float, chunks: int) -> None:
    assert control.transition_chunks(transition_s, fps, 4) == chunks


def test_more_steps_than_the_model_has_timesteps_for_are_refused_with_the_bound() -> None:
    change = control.ParamsChange(steps=3)
    control.check_steps(change, 4)
    with pytest.raises(control.ControlError, match="steps: 3 is refused: this model has timesteps for 2"):
        control.check_steps(change, 2)


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


def test_withheld_frames_and_new_beginnings_are_figures_by_reason() -> None:
    server = ServerMetrics()
    metrics = SessionMetrics(server, offered_at=0.0, latency_budget_s=0.5)
    metrics.on_withheld("nan", 4)
    metrics.on_withheld("text_pending", 5)
    metrics.on_withheld("nan", 4)
    metrics.on_reanchored(2)
    stats = metrics.stats()
    assert (stats["withheld"], stats["reanchored"]) == ({"nan": 8, "text_pending": 5}, 2)
    text = generate_latest(server.registry).decode()
    assert 'livebrush_frames_withheld_total{reason="nan"} 8.0' in text
    assert "livebrush_streams_reanchored_total 2.0" in text


def test_quantiles() -> None:
    assert quantile([], 0.5) is None
    assert (quantile([3, 1, 2], 0.5), quantile(range(1, 101), 0.95)) == (2, 95)
