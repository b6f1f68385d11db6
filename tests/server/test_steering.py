"""Steering from outside: REST, OSC and scene lists, on sessions of the Python client and on published streams."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, cast

import aiohttp
import av
import numpy as np
import pytest
from aiortc import RTCConfiguration, RTCPeerConnection, RTCRtpSender, RTCSessionDescription
from aiortc.mediastreams import VideoStreamTrack
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Counter
from pydantic import SecretStr
from pythonosc.osc_bundle_builder import IMMEDIATELY, OscBundleBuilder
from pythonosc.osc_message_builder import OscMessageBuilder

from engine.config import EngineSettings
from engine.fake import FakeEngine
from livebrush_client import Api, Ended, Live, Refused, connect
from server.app import running_server
from server.metrics import ServerMetrics
from server.openapi import document
from server.osc import DATAGRAMS_BURST, MAX_DATAGRAM_BYTES, OscError, OscListener, listening, load_parser
from server.registry import SessionRegistry
from server.session_context import SessionContext
from server.settings import ServerSettings, TokenSettings
from server.signalling import Signalling
from server.steering import Steering
from tests.server.waiting import until

PATIENCE_S = 30.0


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])


class Grey(VideoStreamTrack):
    """Bright noise of 160x120 at 30 fps."""

    async def recv(self) -> av.VideoFrame:
        pts, time_base = await self.next_timestamp()
        frame = av.VideoFrame.from_ndarray(np.full((120, 160, 3), pts // 3000 % 200, np.uint8), format="rgb24")
        frame.pts, frame.time_base = pts, time_base
        return frame


class House:
    """A server with OSC, its engine, and a client of its REST."""

    def __init__(self, base: str, osc_port: int, engine: FakeEngine, api: Api, metrics: ServerMetrics) -> None:
        self.base = base
        self.engine = engine
        self.api = api
        self._metrics = metrics
        self._osc = ("127.0.0.1", osc_port)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def osc(self, address: str, *values: object) -> None:
        self.datagram(message(address, *values))

    def datagram(self, data: bytes) -> None:
        self._socket.sendto(data, self._osc)

    def counted(self, outcome: str) -> float:
        return self._metrics.registry.get_sample_value("livebrush_osc_messages_total", {"outcome": outcome}) or 0.0

    @property
    def prompts(self) -> set[str]:
        """What the engine paints now."""
        return {stream.params.prompt for stream in self.engine.streams.values()}

    def close(self) -> None:
        self._socket.close()


def message(address: str, *values: Any) -> bytes:
    builder = OscMessageBuilder(address)
    for value in values:
        builder.add_arg(value)
    return builder.build().dgram


def nested(data: bytes, depth: int) -> bytes:
    for _ in range(depth):
        data = b"#bundle\0" + bytes(8) + len(data).to_bytes(4, "big") + data
    return data


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
async def engine() -> FakeEngine:
    return FakeEngine(64, 64, delay_s=0.02, max_streams=4)


@pytest.fixture
async def house(engine: FakeEngine) -> AsyncIterator[House]:
    port = free_port()
    settings = ServerSettings(
        port=0, osc_port=port, engine_kind="fake", engine=EngineSettings(width=64, height=64), max_fps=12
    )
    async with running_server(settings, engine) as (context, http_port):
        base = f"http://127.0.0.1:{http_port}"
        async with Api(base) as api:
            made = House(base, port, engine, api, context.metrics)
            yield made
            made.close()


@asynccontextmanager
async def watching(house: House, **params: Any) -> AsyncIterator[tuple[Live, list[dict[str, Any]]]]:
    """A client, and the notices that it gets."""
    async with connect(house.base, Grey(), timeout_s=PATIENCE_S, **params) as live:
        notices: list[dict[str, Any]] = []
        live.on("notice", notices.append)
        await until(lambda: house.engine.streams, "a stream on the engine")
        yield live, notices


async def test_the_python_client_opens_steers_and_frees_a_session(house: House) -> None:
    async with watching(house, prompt="ink") as (live, _):
        frames = live.frames()
        assert (await anext(frames)).width == 64
        ack = await live.set(prompt="neon", strength=0.5)
        assert ack["params"]["prompt"] == "neon" and ack["first_frame"] is not None
        assert house.prompts == {"neon"}
        with pytest.raises(Refused, match="strength"):
            await live.set(strength=2)
        await until(lambda: live.stats.get("released"), "telemetry")
        await house.api.session(live.answer.session).end()
        async with asyncio.timeout(PATIENCE_S):
            async for _ in frames:
                pass
        with pytest.raises(Ended):
            await live.set(prompt="oil")
    assert await house.api.sessions() == []


async def test_rest_sets_what_the_data_channel_sets_and_the_page_is_told(house: House) -> None:
    async with watching(house, prompt="ink") as (live, notices):
        session = house.api.session(live.answer.session)
        change: dict[str, Any] = {
            "prompt": "neon",
            "transition_s": 1.0,
            "recache": True,
            "strength": 0.25,
            "steps": 2,
            "seed": 7,
        }
        shown = await session.set(**change, bypass=True)
        assert shown["bypass"] is True and shown["params"] == change | {"blend": []}
        await until(lambda: notices and notices[-1]["code"] == "params_changed", "the notice")
        assert (notices[-1]["by"], notices[-1]["params"], notices[-1]["bypass"]) == ("rest", shown["params"], True)
        await until(lambda: house.prompts == {"neon"}, "the prompt on the engine")
        mixed = await session.set(blend=[{"text": "ink", "weight": 3}, {"text": "oil"}])
        assert mixed["params"]["blend"] == [{"text": "ink", "weight": 3.0}, {"text": "oil", "weight": 1.0}]
        assert [one["session"] for one in await house.api.sessions()] == [live.answer.session]
        for bad, said in (({"strength": 2}, "strength"), ({"steps": 9}, "steps"), ({"sed": 1}, "sed")):
            with pytest.raises(Refused, match=said) as refused:
                await session.set(**bad)
            assert refused.value.status == 400
        assert (await session.get())["params"] == mixed["params"]
        await session.end()
        with pytest.raises(Refused) as gone:
            await session.get()
        assert (gone.value.status, gone.value.code) == (404, "session_gone")


async def test_a_scene_list_plays_by_itself_and_by_hand(house: House) -> None:
    async with watching(house) as (live, notices):
        ack = await live.load_scenes([{"name": "dawn", "prompt": "ink", "hold_s": 0.5}, {"prompt": "neon", "seed": 3}])
        assert ack["type"] == "ack"
        await until(lambda: house.prompts == {"neon"}, "the second scene")
        changes = [one for one in notices if one["code"] == "params_changed"]
        told = [(one["by"], one["scene"]["index"], one["message"]) for one in changes]
        assert told == [("scene", 0, "Scene 1: dawn."), ("scene", 1, "Scene 2.")]
        ack = await live.go("previous")
        assert ack["params"]["prompt"] == "ink" and ack["params"]["seed"] == 3
        with pytest.raises(Refused, match="0 to 1") as refused:
            await live.go(2)
        assert refused.value.code == "no_such_scene"
        session = house.api.session(live.answer.session)
        shown = await session.load_scenes([{"prompt": "oil"}, {"prompt": "chalk"}], loop=True)
        assert shown["scene"] == {"index": 0, "name": "", "count": 2, "loop": True, "left_s": None}
        assert (await session.go("previous"))["params"]["prompt"] == "chalk"
        house.osc(f"/livebrush/{live.answer.session}/scene", "next")
        await until(lambda: house.prompts == {"oil"}, "the scene that OSC asked for")
        shown = await session.load_scenes([{"prompt": "oil"}, {"prompt": "mosaic"}, {"prompt": "oil"}], begin=1)
        assert (shown["scene"]["index"], shown["params"]["prompt"]) == (1, "mosaic")
        shown = await session.load_scenes([{"prompt": "oil"}, {"prompt": "chalk"}])
        with pytest.raises(Refused, match="begin 2 must be below"):
            await session.load_scenes([{"prompt": "oil"}, {"prompt": "chalk"}], begin=2)
        ack = await live.load_scenes([{"prompt": f"{n} " * 300} for n in range(20)] + [{"prompt": "end"}], begin=20)
        assert ack["params"]["prompt"] == "end"
        await session.load_scenes([{"prompt": "oil"}, {"prompt": "chalk"}])
        with pytest.raises(Refused, match="hold_s"):
            await session.load_scenes([{"prompt": "a", "hold_s": 0.1}])
        async with aiohttp.ClientSession() as http:
            path = f"{house.base}/api/v1/sessions/{live.answer.session}/scenes"
            async with http.get(path) as response:
                assert [scene["prompt"] for scene in (await response.json())["scenes"]] == ["oil", "chalk"]
            async with http.delete(path) as response:
                assert response.status == 204
        with pytest.raises(Refused) as none:
            await session.go("next")
        assert none.value.code == "no_scenes"
        assert (await session.get())["params"]["prompt"] == "oil"


async def test_osc_steers_and_its_mistakes_are_counted_and_logged_seldom(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with watching(house, prompt="ink") as (live, _):
        to = f"/livebrush/{live.answer.session}"
        house.osc(to + "/prompt", "neon")
        house.osc(to + "/strength", 0.3)
        house.osc(to + "/seed", 12.0)
        house.osc("/livebrush/*/transition", 2)
        house.osc(to + "/bypass", 1.0)
        session = house.api.session(live.answer.session)
        await until(lambda: house.prompts == {"neon"}, "the prompt")
        shown = await session.get()
        params = shown["params"]
        assert (params["strength"], params["seed"], params["transition_s"], shown["bypass"]) == (0.3, 12, 2.0, True)
        bundle = OscBundleBuilder(IMMEDIATELY)
        parts: list[tuple[Any, ...]] = [("/blend", "ink", 1.0, "oil", 3.0), ("/bypass", False)]
        for name, *values in parts:
            part = OscMessageBuilder(to + name)
            for value in values:
                part.add_arg(value)
            bundle.add_content(part.build())
        house.datagram(bundle.build().dgram)
        await until(lambda: any(s.params.blend for s in house.engine.streams.values()), "the blend")
        assert house.counted("applied") == 7
        broken = [
            b"",
            b"nonsense",
            b"/livebrush",
            b"#bundle\0" + b"\xff" * 40,
            # For ever, in python-osc's own reader of bundles.
            b"#bundle\0" + bytes(8) + b"\xff\xff\xff\xfc" * 3,
            b"#bundle\0" + bytes(8) + bytes(4),
            # Beyond Python's own depth, were it read by recursion.
            nested(message(to + "/prompt", "deep"), 400),
            message(to + "/prompt", "ok")[:-4],
            b"/a\0\0," + b"z" * 4000,
            bytes(MAX_DATAGRAM_BYTES + 1),
        ]
        refused = [
            message("/livebrush/nobody/prompt", "x"),
            message(to + "/prompt", 5),
            message(to + "/strength", 7.0),
            message(to + "/strength", float("nan")),
            message(to + "/steps", 1.5),
            message(to + "/fly", 1),
            message(to + "/scene", "next"),
            message(to + "/blend", "ink"),
            message("/other/x/prompt", "x"),
        ]
        for data in broken + refused:
            house.datagram(data)
        house.osc(to + "/prompt", "chalk")
        await until(lambda: house.prompts == {"chalk"}, "a good message after the bad ones")
        assert house.counted("refused") >= len(refused)
        assert house.counted("broken") >= 4
        lines = [record for record in caplog.records if "OSC" in record.getMessage() or record.name == "root"]
        assert 1 <= len(lines) < 6


async def test_who_opened_a_session_steers_it_and_nobody_else_does(engine: FakeEngine) -> None:
    tokens = {"publish": "p" * 40, "admin": "a" * 40}
    settings = ServerSettings.model_validate(
        {"port": 0, "engine_kind": "fake", "engine": {"width": 64, "height": 64}, "tokens": tokens}
    )
    async with running_server(settings, engine) as (_, port):
        base = f"http://127.0.0.1:{port}"
        async with (
            Api(base, token=tokens["publish"]) as publisher,
            Api(base, token=tokens["admin"]) as admin,
            Api(base) as stranger,
            connect(base, Grey(), token=tokens["publish"], timeout_s=PATIENCE_S, prompt="ink") as live,
        ):
            session = live.answer.session
            assert (await publisher.session(session).set(prompt="neon"))["params"]["prompt"] == "neon"
            assert [one["session"] for one in await admin.sessions()] == [session]
            assert (await admin.session(session).set(seed=3))["params"]["seed"] == 3
            for call, status in (
                (publisher.sessions(), 403),
                (stranger.sessions(), 401),
                (stranger.session(session).set(prompt="x"), 401),
                (publisher.session("another").get(), 404),
            ):
                with pytest.raises(Refused) as refused:
                    await call
                assert refused.value.status == status


async def test_osc_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    steering, count = cast(Steering, None), ServerMetrics().osc
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(OscError, match="choose another with --osc-port"):
            async with listening("127.0.0.1", taken.getsockname()[1], steering, count, time.monotonic):
                pass
    monkeypatch.setitem(sys.modules, "pythonosc.osc_message", None)
    with pytest.raises(OscError, match=r"pip install 'livebrush\[osc\]'"):
        async with listening("127.0.0.1", 0, steering, count, time.monotonic):
            pass


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.7", "::", "desk.example"])
def test_osc_on_an_address_that_others_reach_needs_a_word_of_its_own(host: str) -> None:
    with pytest.raises(ValueError, match=r"OSC has no tokens: keep 127\.0\.0\.1, or set osc_unprotected"):
        ServerSettings(osc_port=9000, osc_host=host, tokens=TokenSettings(publish=SecretStr("p" * 40)))
    assert ServerSettings(osc_port=9000, osc_host=host, osc_unprotected=True).osc_host == host
    assert ServerSettings(osc_host=host).osc_port is None  # off
    for loopback in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        assert ServerSettings(osc_port=9000, osc_host=loopback).osc_host == loopback


def test_a_flood_is_cut_and_counted() -> None:
    count = Counter("osc", "", ["outcome"], registry=None)
    listener = OscListener(cast(Steering, None), count, lambda: 1.0, load_parser())
    for _ in range(DATAGRAMS_BURST + 50):
        listener.datagram_received(b"", ("127.0.0.1", 1))
    outcomes = {name: count.labels(name)._value.get() for name in ("broken", "too_fast")}
    assert outcomes == {"broken": DATAGRAMS_BURST, "too_fast": 50}


@given(st.binary(max_size=200), st.integers(0, 3))
def test_whatever_a_datagram_holds_the_next_one_is_read(data: bytes, depth: int) -> None:
    count = Counter("osc", "", ["outcome"], registry=None)
    listener = OscListener(cast(Steering, None), count, time.monotonic, load_parser())
    for one in (
        data,
        b"/livebrush/" + data,
        b"#bundle\0" + bytes(8) + data,
        nested(b"/livebrush/x/y\0\0" + data, depth),
    ):
        listener.datagram_received(one, ("127.0.0.1", 1))


async def test_a_published_stream_is_steered_by_its_name(house: House) -> None:
    connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    video = connection.addTransceiver(Grey(), direction="sendonly")
    codecs = RTCRtpSender.getCapabilities("video").codecs
    video.setCodecPreferences([one for one in codecs if one.mimeType in ("video/VP8", "video/rtx")])
    await connection.setLocalDescription(await connection.createOffer())
    async with aiohttp.ClientSession() as http:
        headers = {"Content-Type": "application/sdp"}
        offer = connection.localDescription.sdp
        async with http.post(house.base + "/whip/stage?prompt=ink", data=offer, headers=headers) as response:
            assert response.status == 201
            await connection.setRemoteDescription(RTCSessionDescription(await response.text(), "answer"))
    try:
        await until(lambda: house.prompts == {"ink"}, "the stream on the engine")
        stream = house.api.stream("stage")
        assert (await stream.set(prompt="neon"))["params"]["prompt"] == "neon"
        house.osc("/livebrush/stage/prompt", "oil")
        await until(lambda: house.prompts == {"oil"}, "the prompt by OSC")
        shown = await stream.load_scenes([{"prompt": "chalk"}])
        assert shown["stream"] == "stage" and shown["scene"]["count"] == 1
        assert [one["stream"] for one in await house.api.sessions()] == ["stage"]
        await stream.end()
        with pytest.raises(Refused) as gone:
            await stream.get()
        assert gone.value.code == "not_live"
    finally:
        await connection.close()


async def test_the_openapi_document_and_its_page_and_the_models_schema(house: House) -> None:
    async with aiohttp.ClientSession() as http:
        async with http.get(house.base + "/api/v1/openapi.json") as response:
            described = json.loads(await response.text())
        async with http.get(house.base + "/api") as response:
            page = await response.text()
            assert response.content_type == "text/html"
        async with http.get(house.base + "/api/v1/models/tiny/schema") as response:
            assert response.status == 404
        model = (await house.api.models())[0]["id"]
        async with http.get(f"{house.base}/api/v1/models/{model}/schema") as response:
            schema = await response.json()
    steps = next(form for form in schema["properties"]["steps"]["anyOf"] if form["type"] == "integer")
    assert steps == {"type": "integer", "minimum": 1, "maximum": 4}
    assert schema["additionalProperties"] is False
    for path in described["paths"]:
        assert f"<code>{path}</code>" in page
    assert described["paths"]["/api/v1/sessions"]["get"]["security"] == [{}, {"token": ["admin"]}]
    text = json.dumps(described)
    names = described["components"]["schemas"]
    assert all(name in names for name in ("SessionChange", "SceneList", "Scene", "WeightedPrompt", "Problem"))
    assert all(f'"#/components/schemas/{name}"' in text for name in ("SessionChange", "SceneList", "SceneGo"))


async def test_the_openapi_document_has_exactly_the_routes() -> None:
    settings = ServerSettings(engine_kind="fake", engine=EngineSettings(width=64, height=64))
    with ThreadPoolExecutor(1) as executor:
        context = SessionContext(FakeEngine(64, 64), settings, ServerMetrics(), executor)
        routes = Signalling(context, SessionRegistry(context), []).application().router.routes()
        found = {(route.method.lower(), route.resource.canonical) for route in routes if route.resource is not None}
    found = {(method, path) for method, path in found if path.startswith("/api/v1/")}
    documented = {(method, path) for path, calls in document()["paths"].items() for method in calls}
    # A route that is missing belongs into the table of server/openapi.py.
    assert {(method, path) for method, path in found if method not in ("head", "options")} == documented
