"""A session without a network: a scripted peer, a scripted engine, and the messages that the page gets."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.api import Capacity, Engine, RenderedChunk, StreamCounters, StreamParams
from server.chunk_book import MAX_SOURCES
from server.ladder import Rung
from server.metrics import ServerMetrics
from server.pacer import MIN_ROOM
from server.peer import Peer
from server.session import Session
from server.session_context import SessionContext
from server.session_terms import rung_name
from server.settings import ServerSettings

PICTURE = np.zeros((8, 8, 3), np.uint8)
FULL = Rung(4, small=False, fps=24)


class Clock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class StillEngine:
    """What a session reads of an engine."""

    capacity = Capacity(chunk_cost_s=0.02, max_streams=4, open_streams=1, chunk_frames=4)
    frame_size = (8, 8)


class ScriptedPeer:
    """What a session says and shows, without a connection."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.video_delay_s = 0.0
        self.said: list[dict[str, Any]] = []
        self.shown: list[Any] = []
        self.unsent: list[tuple[int, str]] = []

    def send_control(self, text: str) -> None:
        self.said.append(json.loads(text))

    def send_frame(self, frame: Any) -> None:
        self.shown.append(frame)

    def take_unsent(self) -> list[tuple[int, str]]:
        unsent, self.unsent = self.unsent, []
        return unsent

    def notices(self, code: str) -> list[dict[str, Any]]:
        return [m for m in self.said if m["type"] == "notice" and m["code"] == code]


class ScriptedStream:
    """A stream that returns what the test tells it to."""

    def __init__(self) -> None:
        self.counters = StreamCounters()
        self.submitted: list[Any] = []
        self.updates: list[StreamParams] = []

    def submit(self, chunk: Any) -> None:
        self.submitted.append(chunk)

    def update(self, params: StreamParams) -> int:
        self.updates.append(params)
        return len(self.updates)

    def __aiter__(self) -> AsyncIterator[RenderedChunk]:
        raise AssertionError("the test hands over what is rendered")

    def rendered(self, place: int, **given: Any) -> RenderedChunk:
        chunk = self.submitted[place]
        return RenderedChunk(
            chunk.index, chunk.frames, chunk.frame_indices, chunk.captured_at, len(self.updates), 0.0, 0.0, **given
        )


def make_session(clock: Clock) -> Session:
    engine = cast(Engine, StillEngine())
    context = SessionContext(engine, ServerSettings(), ServerMetrics(), ThreadPoolExecutor(1), clock)
    return Session("s", context, StreamParams(steps=2, prompt="neon"), fps=24)


@pytest.fixture
async def clock() -> Clock:
    return Clock()


@pytest.fixture
async def session(clock: Clock) -> Session:
    made = make_session(clock)
    made.page.peer = ScriptedPeer()  # type: ignore[assignment]
    return made


def said_by(session: Session) -> ScriptedPeer:
    assert isinstance(session.peer, ScriptedPeer)
    return session.peer


def open_stream(session: Session) -> ScriptedStream:
    stream = ScriptedStream()
    session.media.open(stream)
    return stream


def feed(session: Session, clock: Clock, count: int, first: int = 0) -> None:
    for index in range(first, first + count):
        clock.now += 1 / 24
        session.metrics.on_arrival(clock.now, index, clock.now, admitted=True)
        session.media.take(PICTURE, index, clock.now)


def play_out(session: Session, clock: Clock) -> None:
    while session.media._pacer.due_at() is not None:
        clock.now += 1 / 24
        session.media.release(session.media._pacer.pop(clock.now))


# --- the rung


async def test_a_lower_rung_limits_the_engine_and_keeps_the_wish(session: Session) -> None:
    stream = open_stream(session)
    session.controls.set_rung(Rung(1, small=True, fps=12), "the engine needs 340 ms a chunk")
    assert session.terms.params.steps == 2 and not session.terms.params.small and session.terms.rung.fps == 12
    assert [(p.steps, p.small, p.prompt) for p in stream.updates] == [(1, True, "neon")]
    (notice,) = said_by(session).notices("rung_changed")
    assert (notice["direction"], notice["steps"], notice["small"], notice["fps"], notice["camera"]) == (
        *("down", 1, True, 12),
        False,
    )
    assert notice["reason"] == "the engine needs 340 ms a chunk" and notice["message"].endswith(notice["reason"] + ".")
    for words in ("1 instead of 2 steps", "smaller", "12 instead of 24 frames"):
        assert words in notice["message"]
    assert not said_by(session).notices("rate_changed")
    session.controls.set_rung(FULL, "there is room again")
    assert [(p.steps, p.small) for p in stream.updates] == [(1, True), (2, False)]
    assert said_by(session).notices("rung_changed")[-1]["direction"] == "up"
    assert session.metrics.rung_moves == {"down": 1, "up": 1}


async def test_a_rung_that_changes_nothing_for_this_wish_is_not_told(session: Session) -> None:
    stream = open_stream(session)
    session.controls.set_rung(Rung(2, small=False, fps=24), "the engine is slow")
    assert stream.updates == [] and said_by(session).said == [] and not session.metrics.rung_moves


async def test_a_rung_set_before_the_page_is_there_is_told_when_it_is(session: Session) -> None:
    peer, session.page.peer = session.peer, None
    session.controls.set_rung(Rung(1, small=False, fps=24), "the engine is slow")
    session.page.peer = peer
    session.controls.tell_rung()
    assert [n["steps"] for n in said_by(session).notices("rung_changed")] == [1]


async def test_an_ack_tells_the_wish_and_what_is_in_force(session: Session) -> None:
    session.controls.set_rung(Rung(1, small=False, fps=15), "the engine is slow")
    session.page.request_ack(5, None)
    ack = said_by(session).said[-1]
    assert ack["params"]["steps"] == 2 and "small" not in ack["params"]
    assert ack["in_force"] == {"steps": 1, "small": False, "light": False, "fps": 15, "camera": False}


async def test_on_the_camera_rung_the_camera_moves_and_the_picture_fades_back_in(
    session: Session, clock: Clock
) -> None:
    stream = open_stream(session)
    feed(session, clock, 1)
    session.media.on_rendered(stream, stream.rendered(0))
    play_out(session, clock)
    feed(session, clock, 6, first=1)
    session.controls.set_rung(Rung(1, small=False, fps=24, camera=True), "the engine is far too slow")
    submitted = len(stream.submitted)
    session.media.on_rendered(stream, stream.rendered(1))  # comes back too late: it is not shown
    feed(session, clock, 8, first=7)
    play_out(session, clock)
    assert len(stream.submitted) == submitted
    shown = said_by(session).shown
    assert [frame.kind for frame in shown[1:]] == [0] * (len(shown) - 1) and shown[-1].index == 14
    session.controls.set_rung(FULL, "there is room again")
    feed(session, clock, 4, first=15)
    play_out(session, clock)
    assert shown[-1].index == 18 and shown[-1].kind == 0  # the camera until the restyled picture is there
    assert [chunk.index for chunk in stream.submitted] == [0, 1, 2]
    session.media.on_rendered(stream, stream.rendered(2))
    play_out(session, clock)
    assert shown[-1].kind == 1 and str(session.media.presenter.view) == "fading"


def test_a_rung_has_a_name_of_few_kinds() -> None:
    assert rung_name(Rung(2, small=True, fps=12)) == "2 steps, small, 12 fps"
    assert rung_name(Rung(1, small=False, fps=24)) == "1 step, full, 24 fps"
    assert rung_name(Rung(1, small=False, fps=24, light=True)) == "1 step, light VAE, full, 24 fps"
    assert rung_name(Rung(1, small=True, fps=5, camera=True)) == "camera"


# --- the ledger of a session


async def test_a_lost_chunk_has_the_reason_that_the_engine_gives(session: Session, clock: Clock) -> None:
    stream = open_stream(session)
    feed(session, clock, 13)
    stream.counters.drop("late", 4)
    session.media._chunks.count(stream)
    assert session.metrics.engine_missed == session.metrics.engine_lost == 4
    assert not session.metrics.dropped  # known, but not yet which
    session.media.on_rendered(stream, stream.rendered(0))
    session.media.on_rendered(stream, stream.rendered(2))
    assert session.metrics.dropped == {"engine_late": 4}
    play_out(session, clock)
    session.media.on_rendered(stream, stream.rendered(3))
    play_out(session, clock)
    ledger = session.metrics.ledger
    assert (ledger.due, ledger.on_time + ledger.late, ledger.inside) == (13, 9, 0)


async def test_a_broken_stream_loses_what_was_inside_and_the_camera_in_its_place_is_in_time(
    session: Session, clock: Clock
) -> None:
    stream = open_stream(session)
    feed(session, clock, 1)
    session.media.on_rendered(stream, stream.rendered(0))
    play_out(session, clock)
    feed(session, clock, 6, first=1)
    session.media.lose_all()
    session.media.close()
    assert session.metrics.dropped == {"engine_lost": 6}
    feed(session, clock, 3, first=7)
    play_out(session, clock)
    stream = open_stream(session)
    feed(session, clock, 1, first=10)  # shown as the camera, and submitted: its loss is none
    play_out(session, clock)
    session.media.lose_all()
    ledger = session.metrics.ledger
    assert (ledger.on_time, ledger.dropped.total(), ledger.inside) == (5, 6, 0)


@pytest.mark.parametrize(("reason", "told"), [("closed", 1), ("input_too_large", 1), ("goodbye", 0), ("vanished", 0)])
async def test_the_end_is_summed_up_in_the_log_and_for_a_page_that_is_still_there(
    session: Session, clock: Clock, caplog: pytest.LogCaptureFixture, reason: str, told: int
) -> None:
    stream = open_stream(session)
    feed(session, clock, 5)
    for place in range(2):
        session.media.on_rendered(stream, stream.rendered(place))
    play_out(session, clock)
    peer = said_by(session)
    peer.unsent = [(4, "encoder_behind")]
    session.controls.set_rung(Rung(1, small=False, fps=12), "the engine is slow")
    with caplog.at_level("INFO"):
        await session._sum_up(cast(Peer, peer), reason)
    summary = json.loads(caplog.messages[-1].partition("summary ")[2])
    assert (summary["reason"], summary["due"], summary["on_time_frames"], summary["dropped"], summary["inside"]) == (
        *(reason, 5, 4, {"encoder_behind": 1}),
        0,
    )
    assert summary["dmr"] == 0.2 and summary["rung"]["fps"] == 12 and summary["rung_moves"] == {"down": 1}
    messages = [m for m in peer.said if m["type"] == "summary"]
    assert len(messages) == told and all(m["due"] == 5 for m in messages)


async def test_figures_tell_the_rung_and_that_it_limits(session: Session, clock: Clock) -> None:
    open_stream(session)
    feed(session, clock, 100)
    stats = session.stats()
    assert (
        stats["rung"] == {"steps": 2, "small": False, "light": False, "fps": 24, "camera": False}
        and stats["limited_by"] == "none"
    )
    session.controls.set_rung(Rung(1, small=False, fps=24), "the engine is slow")
    assert session.stats()["limited_by"] == "cpu"


moves = st.lists(
    st.one_of(
        st.tuples(st.just("feed"), st.integers(1, 9)),
        st.tuples(st.sampled_from(["render", "engine_drop", "play", "unsent"]), st.integers(0, 5)),
        st.tuples(st.sampled_from(["lose", "camera", "back"]), st.just(0)),
    ),
    max_size=60,
)


@given(moves)
def test_whatever_happens_every_due_frame_is_in_one_place(script: list[tuple[str, int]]) -> None:
    async def run() -> None:
        clock = Clock()
        session = make_session(clock)
        session.page.peer = peer = ScriptedPeer()  # type: ignore[assignment]
        stream, fed, due_back = open_stream(session), 0, 0
        for kind, number in script:
            match kind:
                case "feed":
                    feed(session, clock, number, first=fed)
                    fed += number
                case "render" if due_back + number < len(stream.submitted):
                    session.media.on_rendered(stream, stream.rendered(due_back + number))
                    due_back += number + 1
                case "engine_drop":
                    stream.counters.drop("late", 4)
                    session.media._chunks.count(stream)
                case "play":
                    for _ in range(number):
                        if session.media._pacer.due_at() is not None:
                            clock.now += 0.04
                            session.media.release(session.media._pacer.pop(clock.now))
                case "unsent" if peer.shown:
                    session.metrics.on_unsent(clock.now, "encoder_behind", peer.shown[-1].index)
                case "lose":
                    session.media.lose_all()
                    session.media.close()
                    stream, due_back = open_stream(session), 0
                case "camera":
                    session.controls.set_rung(Rung(1, small=False, fps=24, camera=True), "the engine is far too slow")
                case "back":
                    session.controls.set_rung(FULL, "there is room again")
            ledger = session.metrics.ledger
            assert ledger.due == fed == ledger.on_time + ledger.late + ledger.dropped.total() + ledger.inside
            # Chunks in the engine, one that fills, and what waits for its release: nothing else is inside.
            assert ledger.inside <= 4 * MAX_SOURCES + 3 + MIN_ROOM

    asyncio.run(run())
