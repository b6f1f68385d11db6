"""A session over one WebSocket: the same pictures, controls and figures; bounded both ways; refusals in words."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import av
import numpy as np
import pytest
from aiortc.rtcrtpparameters import RTCRtpCodecParameters

from engine.config import EngineSettings
from engine.fake import FakeEngine
from server.app import running_server
from server.decoding import Decoder
from server.encoding import VideoEncoder
from server.reassembly import EncodedFrame
from server.settings import MediaSettings, ServerSettings
from server.socket_media import HEADER, KEY_PICTURE, LAG_S, MAX_IN_FLIGHT, PICTURE, RECEIPT, JpegEncoder, Line
from tests.server.test_server import Visitor

PATIENCE_S = 30.0
VP8 = RTCRtpCodecParameters(mimeType="video/VP8", clockRate=90000, payloadType=96)
JPEG = RTCRtpCodecParameters(mimeType="video/JPEG", clockRate=90000, payloadType=96)


def picture(count: int) -> np.ndarray:
    shown = np.full((240, 320, 3), 100, np.uint8)
    shown[:, 4 * count % 280 :][:, :32] = 220
    return shown


class SocketPage:
    """What the page does without UDP: one socket, pictures up at 24 a second, pictures down with their receipts."""

    def __init__(self, base: str, *, form: str = "vp8", receipts: bool = True) -> None:
        self.base = base
        self.form = form
        self.receipts = receipts
        self.texts: list[dict[str, Any]] = []
        self.pictures: list[tuple[int, np.ndarray]] = []
        self.kinds: list[int] = []
        self.received: list[int] = []
        self.welcome: dict[str, Any] = {}
        self.http = aiohttp.ClientSession()
        self._tasks: list[asyncio.Task[None]] = []
        self._key_asked = False
        self._encoder = VideoEncoder(VP8) if form == "vp8" else JpegEncoder()
        self._decoder = Decoder(VP8 if form == "vp8" else JPEG, 10**6)

    async def enter(self, **wish: object) -> dict[str, Any]:
        self.socket = await self.http.ws_connect(self.base.replace("http", "ws") + "/api/v1/socket", max_msg_size=0)
        hello = {"type": "hello", "v": 1, "sends": self.form, "shows": self.form, **wish}
        await self.socket.send_str(json.dumps(hello))
        self.welcome = json.loads((await self.socket.receive(timeout=PATIENCE_S)).data)
        if self.welcome["type"] == "welcome":
            self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._film())]
        return self.welcome

    async def _film(self) -> None:
        count = 0
        while True:
            key, self._key_asked = self._key_asked, False
            for packet in self._encoder.encode_whole(picture(count), count * 3750, 500_000, key):
                kind = KEY_PICTURE if packet.is_keyframe else PICTURE
                await self.socket.send_bytes(HEADER.pack(kind, count) + bytes(packet))
            count += 1
            await asyncio.sleep(1 / 24)

    async def _read(self) -> None:
        async for message in self.socket:
            if message.type is aiohttp.WSMsgType.TEXT:
                self.texts.append(json.loads(message.data))
                self._key_asked |= self.texts[-1]["type"] == "key_frame"
                continue
            kind, number = HEADER.unpack_from(message.data)
            if kind == RECEIPT:
                self.received.append(number)
                continue
            self.kinds.append(kind)
            for shown in self._decoder.decode(EncodedFrame(message.data[HEADER.size :], number, 0.0)):
                assert isinstance(shown, av.VideoFrame)
                self.pictures.append((number, shown.to_ndarray(format="rgb24")))
            if self.receipts:
                await self.socket.send_bytes(HEADER.pack(RECEIPT, number))

    async def until(self, condition: Callable[[], object], what: str) -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not condition():
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"waited {PATIENCE_S:.0f} s in vain for {what}; last {self.texts[-3:]}") from None

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [text for text in self.texts if text["type"] == kind]

    async def leave(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        with contextlib.suppress(AttributeError):
            await self.socket.close()
        await self.http.close()


class House:
    def __init__(self, base: str, engine: FakeEngine) -> None:
        self.base, self.engine = base, engine
        self.pages: list[SocketPage | Visitor] = []

    def page(self, **options: Any) -> SocketPage:
        page = SocketPage(self.base, **options)
        self.pages.append(page)
        return page


@pytest.fixture
async def house() -> AsyncIterator[House]:
    settings = ServerSettings(
        port=0,
        engine_kind="fake",
        engine=EngineSettings(width=64, height=64, max_streams=1),
        max_sessions=1,
        media=MediaSettings(vanish_timeout_s=3.0, max_input_pixels=320 * 240),
    )
    engine = FakeEngine(64, 64, delay_s=0.02, max_streams=1)
    async with running_server(settings, engine) as (_, port):
        built = House(f"http://127.0.0.1:{port}", engine)
        yield built
        for page in built.pages:
            await page.leave()


@pytest.mark.parametrize("form", ["vp8", "jpeg"])
async def test_pictures_come_back_restyled_with_marks_controls_and_figures(house: House, form: str) -> None:
    page = house.page(form=form)
    welcome = await page.enter(params={"prompt": "neon"})
    assert (welcome["type"], welcome["size"], welcome["resumed"]) == ("welcome", "64x64", False)
    await page.until(lambda: len(page.pictures) > 20, "pictures")
    assert page.pictures[-1][1].shape == (64, 64, 3)
    assert page.kinds[0] == KEY_PICTURE and (form == "jpeg" or PICTURE in page.kinds)
    await page.until(lambda: page.of("marks") and page.of("stats"), "marks and figures")
    marked = {row[0] for text in page.of("marks") for row in text["frames"]}
    assert marked & {number for number, _ in page.pictures}
    await page.socket.send_str(json.dumps({"v": 1, "type": "params", "id": 5, "prompt": "ink", "strength": 0.5}))
    await page.until(lambda: page.of("ack"), "an acknowledgement")
    assert page.of("ack")[0]["params"]["prompt"] == "ink"
    await page.socket.send_str(json.dumps({"v": 1, "type": "ping", "id": 6, "t_ms": 1.0}))
    await page.until(lambda: page.of("pong"), "a pong")
    assert page.received == list(range(len(page.received)))


async def test_a_page_without_receipts_gets_few_pictures_and_the_newest_after(house: House) -> None:
    page = house.page(receipts=False)
    await page.enter()

    def dropped() -> int:
        return max((text["dropped"].get("encoder_behind", 0) for text in page.of("stats")), default=0)

    await page.until(lambda: dropped() >= 24, "a second of drops")
    assert 1 <= len(page.pictures) <= MAX_IN_FLIGHT
    last = page.pictures[-1][0]
    page.receipts = True
    await page.socket.send_bytes(HEADER.pack(RECEIPT, last))
    seen = len(page.pictures)
    await page.until(lambda: len(page.pictures) > seen + 5, "pictures after the receipt")
    # What waited meanwhile is not sent after all: the next is some time later.
    assert page.pictures[seen][0] - last > 90_000 * LAG_S


async def test_a_page_without_udp_goes_on_with_its_session_over_the_socket(house: House) -> None:
    visitor = Visitor(house.base)
    house.pages.append(visitor)
    response = await visitor.enter(params={"prompt": "neon", "seed": 7})
    answer = await response.json()
    await visitor.until(lambda: visitor.pictures, "a picture over WebRTC")
    (stream,) = house.engine.streams
    page = house.page()
    welcome = await page.enter(resume={"token": answer["resume"], "keep": True}, told="no_udp")
    assert (welcome["session"], welcome["resumed"]) == (answer["session"], True)
    assert (welcome["params"]["prompt"], welcome["params"]["seed"]) == ("neon", 7)
    await page.until(lambda: len(page.pictures) > 5, "pictures over the socket")
    assert list(house.engine.streams) == [stream]
    async with page.http.delete(house.base + welcome["url"]) as deleted:
        assert deleted.status == 204
    await page.until(lambda: page.socket.closed, "the end of the socket")
    assert page.of("summary")[0]["reason"] == "closed"


async def test_a_socket_that_breaks_may_come_back_and_one_that_says_goodbye_is_over(house: House) -> None:
    page = house.page()
    welcome = await page.enter(params={"prompt": "neon"})
    await page.until(lambda: page.pictures, "a picture")
    (stream,) = house.engine.streams
    transport = page.socket.get_extra_info("socket")
    assert transport is not None
    page.socket._response.connection.transport.abort()  # type: ignore[union-attr]
    again = house.page()
    back = await again.enter(resume={"token": welcome["resume"], "keep": True})
    assert (back["type"], back["session"]) == ("welcome", welcome["session"])
    await again.until(lambda: again.pictures, "a picture after the return")
    assert list(house.engine.streams) == [stream]
    await again.leave()
    await again.until(lambda: not house.engine.streams, "a free seat")
    other = house.page()
    assert (await other.enter())["type"] == "welcome"


@pytest.mark.parametrize(
    ("first", "words"),
    [
        ("{}", "type"),
        ("hello", "Invalid JSON"),
        (json.dumps({"type": "hello", "sends": "av1"}), "sends"),
        (json.dumps({"type": "hello", "params": {"strength": 7}}), "params.strength"),
        (json.dumps({"type": "hello", "params": {"steps": 99}}), "steps"),
        (b"\x01\x00", "first message is a hello"),
    ],
)
async def test_a_broken_hello_is_refused_by_name_and_takes_no_seat(
    house: House, first: str | bytes, words: str
) -> None:
    async with aiohttp.ClientSession() as http, http.ws_connect(house.base + "/api/v1/socket") as socket:
        await (socket.send_bytes(first) if isinstance(first, bytes) else socket.send_str(first))
        refused = json.loads((await socket.receive(timeout=PATIENCE_S)).data)
        assert (refused["type"], refused["status"]) == ("refused", 400)
        assert words in refused["message"]
        assert (await socket.receive(timeout=PATIENCE_S)).data == aiohttp.WSCloseCode.POLICY_VIOLATION
    assert not house.engine.streams


async def test_a_full_house_is_told_with_a_time(house: House) -> None:
    await house.page().enter()
    refused = await house.page().enter()
    assert (refused["type"], refused["code"], refused["retryable"]) == ("refused", "full", True)
    assert refused["retry_after_s"] > 0


async def test_rubbish_is_counted_and_harms_nothing(house: House) -> None:
    page = house.page()
    await page.enter()
    await page.until(lambda: page.pictures, "a picture")
    for rubbish in (b"", b"\x01", b"\x09\x00\x00\x00\x01abc", HEADER.pack(PICTURE, 1), HEADER.pack(RECEIPT, 77)):
        await page.socket.send_bytes(rubbish)
    await page.socket.send_bytes(HEADER.pack(KEY_PICTURE, 1) + b"\x9d\x01\x2a" * 20)
    await page.socket.send_str("x" * 10_000)
    await page.socket.send_str("{")
    await page.until(lambda: page.of("error"), "an error for broken JSON")
    seen = len(page.pictures)
    await page.until(lambda: len(page.pictures) > seen + 10, "more pictures")


async def test_a_picture_over_the_bound_ends_the_session_in_words(house: House) -> None:
    page = house.page()
    await page.enter()
    await page.until(lambda: page.pictures, "a picture")
    (packet,) = VideoEncoder(VP8).encode_whole(np.zeros((480, 640, 3), np.uint8), 0, 500_000, True)
    await page.socket.send_bytes(HEADER.pack(KEY_PICTURE, 9999) + bytes(packet))
    await page.until(lambda: [t for t in page.of("notice") if t["code"] == "input_too_large"], "the reason")
    await page.until(lambda: not house.engine.streams, "the end")


def test_the_bitrate_follows_what_the_line_carries_down_and_up_again() -> None:
    line = Line(MediaSettings(start_bitrate=1_000_000, min_bitrate=100_000, max_bitrate=2_000_000))
    now, number, free_at = 0.0, 0, 0.0
    under_way: list[tuple[float, int]] = []

    def play(seconds: float, capacity: float) -> None:
        """24 pictures a second into a line that carries `capacity` bit/s, first in, first out."""
        nonlocal now, number, free_at, under_way
        for _ in range(round(24 * seconds)):
            now += 1 / 24
            for at, which in [one for one in under_way if one[0] <= now]:
                line.received(which, at)
            under_way = [one for one in under_way if one[0] > now]
            if line.has_room(now):
                number += 1
                size = line.bitrate // (8 * 24)
                line.sent(number, size, now)
                free_at = max(free_at, now) + 8 * size / capacity
                under_way.append((free_at + 0.02, number))

    play(30, 300_000)
    assert line.bitrate <= 400_000
    play(60, 10_000_000)
    assert line.bitrate >= 1_000_000


def test_room_is_bounded_by_count_and_by_age() -> None:
    line = Line(MediaSettings())
    for number in range(MAX_IN_FLIGHT):
        assert line.has_room(0.1)
        line.sent(number, 100, 0.1)
    assert not line.has_room(0.1)
    line.received(MAX_IN_FLIGHT - 2, 0.2)
    assert line.has_room(0.2)
    assert not line.has_room(0.1 + LAG_S)
