"""The server through its real parts: HTTP, WebRTC on loopback, sessions, and an engine that keeps the contract."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import av
import numpy as np
import psutil
import pytest
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError, MediaStreamTrack, VideoStreamTrack
from prometheus_client import generate_latest

from engine.api import StreamParams, Understood
from engine.config import EngineSettings
from engine.fake import FakeEngine, tint
from server.app import running_server
from server.session_context import SessionContext
from server.settings import ServerSettings

PATIENCE_S = 30.0


class MovingPicture(VideoStreamTrack):
    """A bright bar that moves over a grey ramp, 320x240 at 30 fps; other sizes when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.size = (320, 240)
        self.count = 0

    async def recv(self) -> av.VideoFrame:
        pts, time_base = await self.next_timestamp()
        width, height = self.size
        picture = np.tile(np.linspace(40, 160, width, dtype=np.uint8)[None, :, None], (height, 1, 3))
        left = 4 * self.count % (width - 32)
        picture[:, left : left + 32] = 230
        self.count += 1
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = pts, time_base
        return frame


class Visitor:
    """A page without a browser: one peer connection with its channels, and what it has seen."""

    def __init__(self, base: str, configuration: RTCConfiguration | None = None) -> None:
        self.base = base
        self.http = aiohttp.ClientSession()
        self.connection = RTCPeerConnection(configuration or RTCConfiguration(iceServers=[]))
        self.camera = MovingPicture()
        self.connection.addTrack(self.camera)
        self.control = self.connection.createDataChannel("control")
        self.telemetry = self.connection.createDataChannel("telemetry", ordered=False, maxRetransmits=0)
        self.messages: list[dict[str, Any]] = []
        self.telegrams: list[dict[str, Any]] = []
        self.pictures: list[tuple[float, np.ndarray]] = []
        self.url = ""
        self._changed = asyncio.Condition()
        self._reader: asyncio.Task[None] | None = None
        self.control.on("message", lambda text: self._note(self.messages, text))
        self.telemetry.on("message", lambda text: self._note(self.telegrams, text))
        self.connection.on("track", self._on_track)

    def _note(self, store: list[dict[str, Any]], text: str) -> None:
        store.append(json.loads(text))

    def _on_track(self, track: MediaStreamTrack) -> None:
        self._reader = asyncio.create_task(self._read(track))

    async def _read(self, track: MediaStreamTrack) -> None:
        while True:
            try:
                frame = await track.recv()
            except MediaStreamError:
                return
            assert isinstance(frame, av.VideoFrame)
            self.pictures.append((time.monotonic(), frame.to_ndarray(format="rgb24")))

    async def enter(self, **extra: object) -> aiohttp.ClientResponse:
        await self.connection.setLocalDescription(await self.connection.createOffer())
        body = {"type": "offer", "sdp": self.connection.localDescription.sdp, **extra}
        response = await self.http.post(self.base + "/api/v1/webrtc/offer", json=body)
        if response.status == 201:
            answer = await response.json()
            self.url = self.base + answer["url"]
            await self.connection.setRemoteDescription(RTCSessionDescription(answer["sdp"], "answer"))
        return response

    async def until(self, condition: Callable[[], object], what: str) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not condition():
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"waited {PATIENCE_S:.0f} s in vain for {what}") from None

    async def ask(self, **message: object) -> dict[str, Any]:
        await self.until(lambda: self.control.readyState == "open", "an open control channel")
        self.control.send(json.dumps({"v": 1, **message}))

        def answer() -> dict[str, Any] | None:
            kinds = ("ack", "pong", "error")
            return next((m for m in self.messages if m.get("id") == message.get("id") and m["type"] in kinds), None)

        await self.until(answer, f"an answer to {message}")
        found = answer()
        assert found is not None
        return found

    def stats(self) -> dict[str, Any]:
        return next((m for m in reversed(self.telegrams) if m["type"] == "stats"), {})

    async def leave(self) -> None:
        await self.connection.close()
        if self._reader:
            # A track of a connection that the server ended first does not end.
            self._reader.cancel()
            await asyncio.wait([self._reader])
        await self.http.close()


@pytest.fixture
async def engine() -> FakeEngine:
    return FakeEngine(64, 64, delay_s=0.02, max_streams=4)


@pytest.fixture
async def base(engine: FakeEngine) -> AsyncIterator[str]:
    settings = ServerSettings(
        port=0, engine_kind="fake", engine=EngineSettings(width=64, height=64), max_sessions=2, max_fps=24
    )
    async with running_server(settings, engine) as (_, port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
async def visitor(base: str) -> AsyncIterator[Visitor]:
    made = Visitor(base)
    yield made
    await made.leave()


async def get(url: str) -> tuple[int, dict[str, Any]]:
    async with aiohttp.ClientSession() as http, http.get(url) as response:
        return response.status, await response.json()


async def test_an_ack_says_what_the_prompts_were_taken_for(visitor: Visitor, engine: FakeEngine) -> None:
    engine.understands = {
        "warm toon": Understood(styles=(("comic", 1.0),), score=0.91236, modifiers=("warm",)),
        "pen in neon": Understood(styles=(("ink", 0.7), ("neon", 0.3)), score=1.0),
    }
    await visitor.enter(params={"prompt": "a boat"})
    await visitor.until(lambda: len(visitor.pictures) > 10, "pictures")
    ack = await visitor.ask(type="params", id=1, prompt="warm toon")
    # Without a list of styles, as beside the stand-in, an id is its own name.
    toon = {"id": "comic", "name": "comic", "score": 0.912, "modifiers": ["warm"]}
    assert ack["style"] == toon and "styles" not in ack
    ack = await visitor.ask(type="params", id=2, blend=[{"text": "warm toon"}, {"text": "pen in neon", "weight": 2.0}])
    mixed = {"id": "ink", "name": "ink", "score": 1.0, "modifiers": []}
    mixed["second"] = {"id": "neon", "name": "neon", "share": 0.3}
    assert ack["styles"] == [toon, mixed] and ack["style"] == mixed
    ack = await visitor.ask(type="params", id=3, prompt="a boat")
    assert "style" not in ack and "styles" not in ack


async def test_the_picture_comes_back_restyled_with_marks_and_figures(visitor: Visitor) -> None:
    assert (await visitor.enter(params={"prompt": "neon"})).status == 201
    await visitor.until(lambda: len(visitor.pictures) > 30, "thirty pictures")
    await visitor.until(lambda: visitor.stats().get("state") == "restyled", "restyled figures")
    shown = visitor.pictures[-1][1]
    assert shown.shape == (64, 64, 3)
    ramp = np.full((1, 1, 1, 3), 100, np.uint8)
    expected = tint(ramp, StreamParams(prompt="neon"))[0, 0, 0].astype(float)
    assert np.abs(np.median(shown, axis=(0, 1)) - expected).max() < 40
    marks = [row for m in visitor.telegrams if m["type"] == "marks" for row in m["frames"]]
    indices = [row[1] for row in marks]
    assert indices == sorted(indices) and len(set(indices)) == len(indices)
    assert all(row[3] >= row[2] and row[4] == 1 for row in marks)
    stats = visitor.stats()
    assert stats["ttff_ms"] > 0 and stats["due"] >= stats["released"] > 0 and 0.5 <= stats["on_time"] <= 1


async def test_a_prompt_change_is_acknowledged_with_the_frame_that_shows_it(visitor: Visitor) -> None:
    await visitor.enter(params={"prompt": "neon"})
    await visitor.until(lambda: len(visitor.pictures) > 10, "pictures")
    released = visitor.stats().get("released", 0)
    ack = await visitor.ask(type="params", id=7, prompt="ink", strength=0.5)
    assert ack["type"] == "ack" and ack["first_frame"] > released / 2
    assert ack["params"] == {
        "prompt": "ink",
        "blend": [],
        "transition_s": 0.0,
        "recache": False,
        "strength": 0.5,
        "steps": 1,
        "seed": 0,
    }
    # One frame, then fours: the chunk of a frame follows from nothing dropped.
    assert 0 < ack["first_chunk"] <= ack["first_frame"]
    assert (await visitor.ask(type="bypass", id=8, on=True))["first_frame"] >= ack["first_frame"]
    count = len(visitor.pictures)
    await visitor.until(lambda: len(visitor.pictures) > count + 10, "pictures after the change")
    assert abs(int(np.median(visitor.pictures[-1][1])) - 100) < 40  # the camera itself


async def test_bad_messages_are_answered_and_harm_nothing(visitor: Visitor) -> None:
    await visitor.enter()
    await visitor.until(lambda: visitor.control.readyState == "open", "an open channel")
    visitor.control.send("{nonsense")
    long = await visitor.ask(type="params", id=1, prompt="x" * 5000)
    unknown = await visitor.ask(type="fly", id=2)
    wrong = await visitor.ask(type="params", id=3, steps=9)
    assert "1000 characters" in long["message"] and "5000 characters" in long["message"]
    assert unknown["type"] == wrong["type"] == "error" and "4" in wrong["message"]
    assert (await visitor.ask(type="ping", id=4, t_ms=1.5))["t_ms"] == 1.5
    count = len(visitor.pictures)
    await visitor.until(lambda: len(visitor.pictures) > count + 5, "pictures after bad messages")


async def test_the_camera_passes_through_while_the_model_loads_then_fades(base: str, engine: FakeEngine) -> None:
    await engine.lose_rank()
    engine.delay_s = 0.02
    loading = asyncio.create_task(engine.lose_rank(down_s=2.0))
    await asyncio.sleep(0)
    visitor = Visitor(base)
    try:
        response = await visitor.enter(params={"prompt": "neon"})
        assert response.status == 201 and not loading.done()
        await visitor.until(lambda: visitor.stats().get("state") == "passthrough", "the camera itself")
        assert (await get(base + "/readyz"))[0] == 503
        await visitor.until(lambda: visitor.stats().get("state") == "restyled", "the restyled picture")
        codes = [m["code"] for m in visitor.messages if m["type"] == "notice"]
        assert codes[:2] == ["model_loading", "model_ready"]
        assert (await get(base + "/readyz"))[0] == 200
    finally:
        await visitor.leave()
        await loading


async def test_a_lost_engine_shows_the_camera_and_comes_back(visitor: Visitor, engine: FakeEngine) -> None:
    await visitor.enter(params={"prompt": "neon"})
    await visitor.until(lambda: visitor.stats().get("state") == "restyled", "the restyled picture")
    lost = asyncio.create_task(engine.lose_rank(down_s=1.5))
    await visitor.until(lambda: visitor.stats().get("state") == "passthrough", "the camera")
    ack = await visitor.ask(type="params", id=1, prompt="ink")
    assert ack["first_frame"] is None and ack["params"]["prompt"] == "ink"
    await visitor.until(lambda: visitor.stats().get("state") == "restyled", "the restyled picture again")
    assert next(iter(engine.streams.values())).params.prompt == "ink"
    notices = [m["code"] for m in visitor.messages if m["type"] == "notice"]
    assert notices == ["model_ready", "engine_lost", "engine_back"]
    await lost


async def test_two_visitors_share_evenly_and_the_third_is_told_when_to_come_back(base: str, engine: FakeEngine) -> None:
    engine.delay_s, engine.small_share = 0.1, 0.0  # without a smaller size, frames are all there is to give up
    one, two, three = Visitor(base), Visitor(base), Visitor(base)
    try:
        await one.enter(params={"prompt": "neon"})
        await one.until(lambda: one.stats().get("agreed_fps") == 24, "the full rate")
        await two.enter(params={"prompt": "ink"})
        await one.until(lambda: one.stats().get("agreed_fps") == 15, "an evenly lowered rate")
        await two.until(lambda: two.stats().get("agreed_fps") == 15, "the same rate for both")
        told = next(m for m in one.messages if m.get("code") == "rung_changed")
        assert (told["direction"], told["fps"]) == ("down", 15) and "ms a chunk for each of 2 sessions" in told[
            "reason"
        ]
        refused = await three.enter()
        problem = await refused.json()
        assert refused.status == 503 and problem["code"] == "full" and problem["retryable"]
        assert 2 <= problem["retry_after_s"] <= float(refused.headers["Retry-After"]) <= 60
        assert (problem["seats"], problem["open"]) == (2, 2)
        assert {s.params.prompt for s in engine.streams.values()} == {"neon", "ink"}
    finally:
        for visitor in (one, two, three):
            await visitor.leave()


async def test_an_engine_that_slows_down_takes_the_picture_a_rung_down_and_gives_all_of_it_back(
    visitor: Visitor, base: str, engine: FakeEngine
) -> None:
    engine.delay_s = 0.05
    await visitor.enter(params={"prompt": "neon"})
    await visitor.until(lambda: visitor.stats().get("state") == "restyled", "the restyled picture")

    def moves() -> list[dict[str, Any]]:
        return [m for m in visitor.messages if m.get("code") == "rung_changed"]

    def stream() -> StreamParams:
        return next(iter(engine.streams.values())).params

    engine.delay_s = 0.2
    await visitor.until(lambda: stream().small, "the smaller size")
    await visitor.until(moves, "a notice of it")
    assert (moves()[0]["direction"], moves()[0]["small"], moves()[0]["camera"]) == ("down", True, False)
    rung = (await get(base + "/api/v1/capacity"))[1]["rung"]
    assert rung["small"] and rung["steps"] == 1
    engine.delay_s = 0.05
    await visitor.until(lambda: not stream().small, "the full size")
    await visitor.until(lambda: moves()[-1]["direction"] == "up", "a notice of it")
    assert (moves()[-1]["small"], moves()[-1]["fps"]) == (False, 24)
    assert visitor.stats()["state"] == "restyled"


async def test_a_camera_that_changes_size_in_mid_stream_goes_on(visitor: Visitor) -> None:
    await visitor.enter(params={"prompt": "neon"})
    await visitor.until(lambda: len(visitor.pictures) > 5, "pictures")
    for size in ((480, 640), (160, 120)):
        visitor.camera.size = size
        count = len(visitor.pictures)
        await visitor.until(lambda seen=count: len(visitor.pictures) > seen + 10, f"pictures at {size}")  # type: ignore[misc]
        assert visitor.pictures[-1][1].shape == (64, 64, 3)


async def test_delete_frees_everything_at_once(base: str, engine: FakeEngine) -> None:
    us = psutil.Process()
    for turn in range(4):
        visitor = Visitor(base)
        await visitor.enter()
        await visitor.until(lambda v=visitor: len(v.pictures) > 3, "pictures")  # type: ignore[misc]
        async with visitor.http.delete(visitor.url) as response:
            assert response.status == 204
        assert engine.capacity.open_streams == 0
        assert (await get(base + "/api/v1/capacity"))[1]["open"] == 0
        async with visitor.http.delete(visitor.url) as response:
            assert response.status == 404 and (await response.json())["code"] == "session_gone"
        await visitor.leave()
        if turn == 0:
            descriptors, threads = us.num_fds(), us.num_threads()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("peer")]
    ours = ("engine/", "registry/")
    names = [task.get_name() for task in asyncio.all_tasks()]
    assert not [name for name in names if "/" in name and not name.startswith(ours)]
    assert us.num_fds() <= descriptors + 2
    # Those of C libraries too; the server's own small pool may still have grown by one.
    assert us.num_threads() <= threads + 1


async def test_broken_offers_are_refused_by_name_and_keep_no_seat(base: str) -> None:
    url = base + "/api/v1/webrtc/offer"
    cases: list[tuple[dict[str, Any], int]] = [
        ({"data": b"{", "headers": {"Content-Type": "application/json"}}, 400),
        ({"data": b"v=0", "headers": {"Content-Type": "application/sdp"}}, 415),
        ({"json": {"type": "offer", "sdp": "v=0"}}, 422),
        ({"json": {"type": "offer", "sdp": "x" * 200_000}}, 413),
        ({"json": {"type": "offer", "sdp": "v=0", "params": {"strength": 7}}}, 400),
        ({"json": {"type": "offer", "sdp": "v=0", "params": {"prompt": "x" * 10_000}}}, 400),
    ]
    async with aiohttp.ClientSession() as http:
        for arguments, status in cases:
            async with http.post(url, **arguments) as response:
                problem = await response.json(content_type="application/problem+json")
                assert response.status == status, problem
                assert problem["code"] and problem["message"]
    assert (await get(base + "/api/v1/capacity"))[1]["open"] == 0


async def test_other_origins_and_hosts_are_refused(base: str) -> None:
    async with aiohttp.ClientSession() as http:
        async with http.get(base + "/livez", headers={"Origin": "http://evil.example"}) as response:
            assert response.status == 403
        async with http.get(base + "/livez", headers={"Host": "evil.example"}) as response:
            assert response.status == 403
        async with http.get(base + "/livez") as response:
            assert response.status == 200
        async with http.get(base + "/../pyproject.toml") as response:
            assert response.status == 404
        async with http.get(base + "/metrics") as response:
            assert response.status == 404  # on the operator's listener alone


async def test_a_stopping_server_says_goodbye_and_takes_no_new_offers(engine: FakeEngine) -> None:
    settings = ServerSettings(port=0, engine_kind="fake", engine=EngineSettings(width=64, height=64))
    async with running_server(settings, engine) as (_, port):
        visitor = Visitor(f"http://127.0.0.1:{port}")
        await visitor.enter()
        await visitor.until(lambda: len(visitor.pictures) > 3, "pictures")
        await visitor.until(lambda: visitor.control.readyState == "open", "an open channel")
    await visitor.until(lambda: any(m.get("code") == "closing" for m in visitor.messages), "the closing notice")
    assert engine.status.state == "closed"
    await visitor.leave()


# --- a model that is served in its own way


class Wan:
    """A server over a stand-in for a large model: 16 fps, a first chunk of five, two steps, minutes to load."""

    context: SessionContext

    def __init__(self, **engine: Any) -> None:
        self.engine = FakeEngine(96, 64, first_chunk_frames=5, **{"delay_s": 0.05, **engine})
        self.settings = ServerSettings(
            port=0, engine_kind="fake", engine=EngineSettings(width=96, height=64), max_fps=16, steps=2
        )


@contextlib.asynccontextmanager
async def visited(wan: Wan, **extra: object) -> AsyncIterator[tuple[str, Visitor]]:
    async with running_server(wan.settings, wan.engine) as (wan.context, port):
        visitor = Visitor(f"http://127.0.0.1:{port}")
        try:
            response = await visitor.enter(**extra)
            assert response.status == 201, await response.text()
            yield visitor.base, visitor
        finally:
            await visitor.leave()


async def test_a_model_is_served_at_its_own_size_rate_and_steps() -> None:
    wan = Wan()
    async with visited(wan, params={"prompt": "neon"}) as (base, visitor):
        (model,) = (await get(base + "/api/v1/models"))[1]["models"]
        assert (model["size"], model["fps"], model["steps"], model["steps_max"]) == ("96x64", 16, 2, 4)
        await visitor.until(lambda: visitor.stats().get("state") == "restyled", "restyled figures")
        await visitor.until(lambda: visitor.stats()["released"] > 48, "three seconds of pictures")
        assert next(iter(wan.engine.streams.values())).params.steps == 2
        assert visitor.pictures[-1][1].shape == (64, 96, 3)
        stats = visitor.stats()
        assert stats["agreed_fps"] == 16 and stats["dropped"] == {} and stats["on_time"] == 1
        assert stats["fps"] == pytest.approx(16, abs=2)


async def test_a_stream_batch_shows_the_right_frames_a_chunk_later() -> None:
    async with visited(Wan(held_chunks=1), params={"prompt": "neon"}) as (_, visitor):
        await visitor.until(lambda: visitor.stats().get("released", 0) > 32, "two seconds of pictures")
        marks = [row for m in visitor.telegrams if m["type"] == "marks" for row in m["frames"]]
        assert all(row[4] == 1 for row in marks)
        indices = [row[1] for row in marks]
        assert indices == sorted(indices)
        assert "source_forgotten" not in visitor.stats()["dropped"]


async def test_loading_is_told_by_percent_at_most_once_a_second_while_the_camera_moves() -> None:
    started = time.monotonic()
    async with visited(Wan(load_s=3.0), params={"prompt": "neon"}) as (base, visitor):
        await visitor.until(lambda: len(visitor.pictures) > 10, "the camera itself")
        status, readiness = await get(base + "/readyz")
        assert (status, readiness["stage"]) == (503, "loading") and readiness["percent"] > 0
        await visitor.until(lambda: visitor.stats().get("state") == "restyled", "the restyled picture")
        loading = [m for m in visitor.messages if m.get("code") == "model_loading"]
        percents = [m["percent"] for m in loading]
        assert percents == sorted(set(percents)) and len(percents) >= 3
        assert len(percents) <= 2 + (time.monotonic() - started)
        assert {m["stage"] for m in loading} == {"loading"}
        assert [m["code"] for m in visitor.messages if m["type"] == "notice"][-1] == "model_ready"


async def test_a_picture_that_is_not_fit_is_the_camera_told_once_and_counted() -> None:
    wan = Wan()
    async with visited(wan, params={"prompt": "neon"}) as (_, visitor):
        await visitor.until(lambda: visitor.stats().get("state") == "restyled", "the restyled picture")
        wan.engine.fault = "black"
        await visitor.until(lambda: visitor.stats().get("state") == "withheld", "the camera in its place")
        await visitor.until(lambda: visitor.stats()["withheld"].get("black", 0) >= 16, "four chunks withheld")
        ack = asyncio.create_task(visitor.ask(type="params", id=5, prompt="ink"))
        assert abs(int(np.median(visitor.pictures[-1][1])) - 100) < 40  # the camera itself, not black
        wan.engine.fault, wan.engine.reanchor = "", True
        await visitor.until(lambda: visitor.stats().get("state") == "restyled", "the restyled picture again")
        # Acknowledged by a picture that shows it, not by the camera.
        marks = {row[1]: row[4] for m in visitor.telegrams if m["type"] == "marks" for row in m["frames"]}
        assert marks[(await ack)["first_frame"]] == 1
        assert visitor.stats()["reanchored"] == 1
        faults = [m for m in visitor.messages if m.get("code") == "model_fault"]
        assert [fault["reason"] for fault in faults] == ["black"] and "a black picture" in faults[0]["message"]
        text = generate_latest(wan.context.metrics.registry).decode()
        assert 'livebrush_frames_withheld_total{reason="black"}' in text
        assert "livebrush_streams_reanchored_total 1.0" in text


async def test_a_blend_and_a_transition_reach_the_engine_in_chunks() -> None:
    wan = Wan()
    async with visited(wan, params={"prompt": "neon", "transition_s": 1.5}) as (_, visitor):
        await visitor.until(lambda: visitor.stats().get("state") == "restyled", "the restyled picture")
        ack = await visitor.ask(type="params", id=1, blend=[{"text": "neon", "weight": 3}, {"text": "ink"}])
        assert ack["params"]["transition_s"] == 1.5 and ack["first_chunk"] is not None
        assert ack["params"]["blend"] == [{"text": "neon", "weight": 3.0}, {"text": "ink", "weight": 1.0}]
        (stream,) = wan.engine.streams.values()
        assert stream.params.transition_chunks == 6  # 1.5 s of chunks of a quarter
        assert [prompt.text for prompt in stream.params.prompts] == ["neon", "ink"]
        refused = await visitor.ask(type="params", id=2, transition_s=60)
        assert refused["type"] == "error" and "30" in refused["message"]
