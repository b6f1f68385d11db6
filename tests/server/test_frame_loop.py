"""The pure parts of a session: rate gate, chunks, pacer, presenter, acknowledgements, figures."""

from collections import deque
from collections.abc import Callable

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest

from engine.api import FrameChunk, StreamParams
from server import control
from server.acks import Ack, AckBook
from server.ingest import ChunkAssembler, RateGate, to_rgb
from server.metrics import ServerMetrics, SessionMetrics, quantile
from server.pacer import MAX_CHUNKS, TOLERANCE_S, Pacer
from server.presenter import FADE_FRAMES, Picture, Presenter, View

GREY = np.full((8, 8, 3), 100, np.uint8)
WHITE = np.full((8, 8, 3), 200, np.uint8)
BUDGET_S = 0.5


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


def test_frames_of_a_gap_that_come_together_after_it_are_admitted_and_a_rush_is_not() -> None:
    gate = RateGate(15)
    assert all(gate.admit(number / 15) for number in range(30))
    assert 4 <= sum(gate.admit(2.2) for _ in range(12)) <= 5  # three that were held up, and its own
    assert all(gate.admit(2.2 + number / 15) for number in range(1, 10))


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


def pace(
    engine_s: Callable[[float, np.random.Generator], float],
    *,
    seconds: float = 40.0,
    camera_fps: float = 30.0,
    fps: float = 24.0,
    first: int = 1,
) -> list[tuple[float, int, float]]:
    """(released at, frame, captured at) of a jittery camera, thinned, through an engine that takes a chunk at a time.

    engine_s: what a chunk begun at an instant takes. The engine drops a chunk that would be late while a newer waits.
    """
    random, gate, assembler = (
        np.random.default_rng(0),
        RateGate(fps),
        ChunkAssembler(4, BUDGET_S, first_chunk_frames=first),
    )
    pacer: Pacer[int] = Pacer(fps, BUDGET_S)
    chunks = []
    for frame in range(round(seconds * camera_fps)):
        arrived_at = frame / camera_fps + random.uniform(-0.003, 0.003)
        if gate.admit(arrived_at) and (chunk := assembler.push(GREY, index=frame, arrived_at=arrived_at)):
            chunks.append(chunk)
    captured = {i: at for chunk in chunks for i, at in zip(chunk.frame_indices, chunk.captured_at, strict=True)}
    released: list[tuple[float, int]] = []
    now = free_at = 0.0
    waiting: deque[FrameChunk] = deque()
    while chunks or waiting:
        free_at = free_at if waiting else max(free_at, chunks[0].captured_at[-1])
        while chunks and chunks[0].captured_at[-1] <= free_at:
            waiting.append(chunks.pop(0))
        cost_s = engine_s(free_at, random)
        while len(waiting) > 1 and waiting[0].deadline < free_at + cost_s:
            waiting.popleft()
        free_at += cost_s
        released += play(pacer, free_at, now)
        now = max(now, free_at)
        done = waiting.popleft()
        assert pacer.push(list(done.frame_indices), done.captured_at, now) == []
    return [(at, frame, captured[frame]) for at, frame in released]


def spread(released: list[tuple[float, int, float]], since: float = 5.0) -> tuple[float, float, float, float]:
    """Interval P99, jitter P99, mean age and largest age, in seconds, of what was released from `since` on."""
    shown = [row for row in released if row[0] >= since]
    gaps = np.diff([at for at, _, _ in shown])
    ages = [at - captured_at for at, _, captured_at in shown]
    jitter = np.abs(np.diff(gaps))
    return float(np.quantile(gaps, 0.99)), float(np.quantile(jitter, 0.99)), float(np.mean(ages)), max(ages)


@pytest.mark.parametrize(
    ("engine_ms", "noise", "jitter_frames"), [(60, 0.0, 0.25), (60, 0.3, 0.4), (100, 0.3, 0.5), (130, 0.3, 0.6)]
)
def test_chunks_of_four_come_out_evenly_and_in_time(engine_ms: float, noise: float, jitter_frames: float) -> None:
    released = pace(lambda _, random: engine_ms / 1000 * random.uniform(1 - noise, 1 + noise))
    interval_p99_s, jitter_p99_s, mean_age_s, largest_age_s = spread(released)
    assert [frame for _, frame, _ in released] == sorted(frame for _, frame, _ in released)
    assert interval_p99_s < 1.5 / 24 and jitter_p99_s < jitter_frames / 24
    # An even stream cannot be younger than the oldest frame of a chunk: three intervals to fill it, and the engine.
    assert mean_age_s < (3 / 24 + engine_ms / 1000) * 1.15 and largest_age_s <= BUDGET_S


@pytest.mark.parametrize(("camera_fps", "shown_fps"), [(30, 16), (16, 16), (10, 10)])
def test_sixteen_a_second_in_chunks_of_a_quarter_second_come_out_evenly(camera_fps: float, shown_fps: float) -> None:
    """The whole way of a model with a first chunk of five, for cameras faster, as fast and slower than its rate."""
    released = pace(lambda _, random: random.uniform(0.11, 0.13), camera_fps=camera_fps, fps=16, first=5)
    assert len(released) / 40 == pytest.approx(shown_fps, rel=0.03)
    gaps = np.diff([at for at, _, _ in released if at > 10])
    assert np.median(gaps) == pytest.approx(1 / shown_fps, abs=0.005) and gaps.max() < 1.5 / shown_fps


def test_a_slow_engine_slows_the_picture_evenly_and_costs_no_deadline() -> None:
    """Two thirds of the frames are rendered: the interval is the engine's, and what came in time is shown in time."""
    released = pace(lambda _, random: 0.25)
    interval_p99_s, _, mean_age_s, _ = spread(released)
    gaps = np.diff([at for at, _, _ in released if at > 5])
    assert np.mean(gaps) == pytest.approx(0.25 / 4, rel=0.03) and interval_p99_s < 2 * 0.25 / 4
    assert mean_age_s < BUDGET_S


def test_an_engine_that_turns_four_times_slower_slows_the_picture_within_seconds() -> None:
    released = pace(lambda at, random: 0.08 if at < 15 else 0.32)
    before, after = ([row for row in released if low < row[0] < high] for low, high in ((5, 15), (20, 40)))
    assert np.mean(np.diff([at for at, _, _ in before])) == pytest.approx(1 / 24, rel=0.03)
    gaps = np.diff([at for at, _, _ in after])
    assert np.mean(gaps) == pytest.approx(0.08, rel=0.05) and np.quantile(gaps, 0.95) < 2 * 0.08


def test_a_late_release_is_made_up_for() -> None:
    """Timers on a busy machine: every seventh release comes 50 ms late. The delay must not grow with each of them."""
    pacer: Pacer[int] = Pacer(24, BUDGET_S)
    ages, now, count = [], 0.0, 0
    for chunk in range(200):
        ready_at = (4 * chunk + 3) / 24 + 0.06
        while (due := pacer.due_at()) is not None and max(due, now) < ready_at:
            now = max(due, now) + (0.05 if count % 7 == 0 else 0.001)
            frame = pacer.pop(now)
            ages.append(now - frame / 24)
            count += 1
        now = max(now, ready_at)
        assert pacer.push([4 * chunk + i for i in range(4)], [(4 * chunk + i) / 24 for i in range(4)], now) == []
    # Three intervals to fill a chunk and the engine: 185 ms. Where each late release stays delay it is 300 ms.
    assert np.mean(ages[40:]) < 0.185 + 0.08 and max(ages[40:]) < 0.185 + 0.12


def test_a_stall_is_made_up_for() -> None:
    stalled: list[float] = []

    def engine_s(at: float, random: np.random.Generator) -> float:
        if at > 15 and not stalled:
            stalled.append(at)
            return 0.45
        return 0.08

    released = pace(engine_s)
    ages = {low: np.mean([at - c for at, _, c in released if low < at < low + 5]) for low in (8, 22)}
    assert ages[22] < 1.15 * ages[8]


def test_a_picture_that_can_be_in_time_does_not_wait_past_its_deadline() -> None:
    pacer: Pacer[int] = Pacer(10, BUDGET_S)
    pacer.push([0], [0.0], 0.1)
    pacer.pop(0.1)
    pacer.push([1], [0.05], 0.2)  # even: 0.2; its own deadline: 0.55
    pacer.pop(0.5)
    pacer.push([2], [0.06], 0.51)  # even would be 0.6
    due = pacer.due_at()
    assert due is not None and due <= 0.06 + BUDGET_S + 0.75 / 10


def test_what_is_far_too_old_is_not_shown_while_a_newer_picture_waits() -> None:
    pacer: Pacer[int] = Pacer(24, BUDGET_S)
    pacer.push([0, 1, 2, 3], [i / 24 for i in range(4)], BUDGET_S + 0.15)
    assert pacer.shed(BUDGET_S + 0.09) == []
    assert pacer.shed(BUDGET_S + 0.15) == [0, 1]
    # The newest is shown however old it is: a late picture is more than none.
    assert pacer.shed(BUDGET_S + 9) == [2]
    assert pacer.pop(BUDGET_S + 9) == 3


@given(st.lists(st.floats(0, 0.3), min_size=1, max_size=40), st.floats(0.02, 0.6))
def test_the_pacer_never_holds_more_than_three_chunks_and_keeps_order(waits: list[float], latency_s: float) -> None:
    pacer: Pacer[int] = Pacer(24, BUDGET_S)
    now, shown, lost = 0.0, [], []
    for chunk, wait in enumerate(waits):
        shown += [picture for _, picture in play(pacer, now + wait, now)]
        now += wait
        lost += pacer.push([4 * chunk + i for i in range(4)], [now - latency_s + i / 24 for i in range(4)], now)
        assert len(pacer) <= MAX_CHUNKS * 4
    shown += [picture for _, picture in play(pacer, now + 5, now)]
    assert shown == sorted(shown) and sorted(shown + lost) == list(range(4 * len(waits)))


def late_by(low_s: float, high_s: float, chunks: int = 120) -> list[tuple[float, float]]:
    """(released at, captured at) where each chunk's first picture is between these ages when the chunk comes."""
    random, pacer, now, released, ready_at = np.random.default_rng(0), Pacer[int](24, BUDGET_S), 0.0, [], 0.0
    for chunk in range(chunks):
        ready_at = max(ready_at, 4 * chunk / 24 + random.uniform(low_s, high_s))
        while (due := pacer.due_at()) is not None and max(due, now) < ready_at:
            now = max(due, now) + 0.001
            assert pacer.shed(now) == []
            released.append((now, pacer.pop(now) / 24))
        now = max(now, ready_at)
        pacer.push([4 * chunk + i for i in range(4)], [(4 * chunk + i) / 24 for i in range(4)], now)
    return released[100:]


def test_chunks_that_are_all_a_little_late_are_shown_late_and_evenly() -> None:
    released = late_by(BUDGET_S, BUDGET_S + 0.08)
    gaps = np.diff([at for at, _ in released])
    assert np.quantile(gaps, 0.99) < 2.2 / 24  # 2.8 where the delay is not adapted
    assert max(at - captured for at, captured in released) < BUDGET_S + 0.1


def test_chunks_that_are_late_now_and_then_leave_the_others_in_time() -> None:
    released = late_by(BUDGET_S - 0.1, BUDGET_S + 0.02)
    assert np.mean([at - captured > BUDGET_S for at, captured in released]) < 0.2


@given(st.lists(st.floats(0.05, 0.9), min_size=1, max_size=40))
def test_only_what_is_over_the_tolerance_is_not_shown_and_never_the_newest(latencies_s: list[float]) -> None:
    pacer: Pacer[int] = Pacer(24, BUDGET_S)
    now, seen = 0.0, set()
    for chunk, latency_s in enumerate([*latencies_s, 0.1]):
        ready_at = max(now, 4 * chunk / 24 + latency_s)
        while (due := pacer.due_at()) is not None and max(due, now) < ready_at:
            now = max(due, now)
            for picture in pacer.shed(now):
                assert now - picture / 24 > BUDGET_S + TOLERANCE_S
                seen.add(picture)
            seen.add(pacer.pop(now))
        now = ready_at
        seen.update(pacer.push([4 * chunk + i for i in range(4)], [(4 * chunk + i) / 24 for i in range(4)], now))
    newest = 4 * len(latencies_s) + 3
    assert newest not in seen and len(pacer) + len(seen) == newest + 1


def test_the_cameras_single_pictures_find_room_behind_the_engines_last_chunks() -> None:
    pacer: Pacer[int] = Pacer(24, BUDGET_S)
    lost = pacer.push([0, 1, 2, 3], [i / 24 for i in range(4)], 0.25)
    for i in range(4):
        lost += pacer.push([4 + i], [0.26 + i / 24], 0.26 + i / 24)
    assert lost == []


# --- presenter


@given(st.lists(st.floats(0.0, 3.0), min_size=1, max_size=60))
def test_a_late_picture_is_no_reason_for_the_camera(ages_s: list[float]) -> None:
    """Once it is restyled it stays so, however late single pictures are: only the ladder goes to the camera."""
    presenter = Presenter()
    frames = [presenter.present(Picture(i, -age_s, GREY, WHITE)) for i, age_s in enumerate(ages_s)]
    assert all(np.array_equal(frame.rgb, WHITE) for frame in frames) and presenter.view is View.RESTYLED


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
        metrics.on_arrival(i / 30, i, i / 30, admitted=i < 80)
    metrics.on_dropped(3.0, "engine_late", range(70, 74))
    metrics.on_release(3.0, 79, 2.8, restyled=True)
    metrics.on_release(3.1, 75, 2.5, restyled=True)
    assert (metrics.due, metrics.late, metrics.thinned, metrics.ttff_s) == (80, 1, 20, 3.0)
    assert metrics.on_time() == pytest.approx(75 / 80)
    assert metrics.stats()["dropped"] == {"engine_late": 4}


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
