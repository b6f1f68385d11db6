"""One session of the load generator: a page without a browser.

It offers, sends the clip, opens both channels, and notes every picture that comes back at the last packet of it.
aiortc's own receiver holds a frame back until the next one begins; the server's is used instead (rtp_receiver.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiortc import (
    RTCBundlePolicy,
    RTCConfiguration,
    RTCDtlsTransport,
    RTCPeerConnection,
    RTCRtpSender,
    RTCSessionDescription,
)
from aiortc.rtcrtpparameters import RTCRtpCodecParameters
from aiortc.rtcrtpsender import RTCEncodedFrame

from livebrush_client import Api, Refused
from server.ice_guard import IceGuard
from server.load_clip import ClipTrack, EncodedClip
from server.load_figures import ServerClock, SessionFigures
from server.reassembly import EncodedFrame, FrameOrder, PacketOrder, is_vp8_key_frame
from server.rtp_receiver import MediaReceiver
from server.settings import MediaSettings

PING_PERIOD_S = 1.0
# The server speaks twice a second; aiortc notices that it is gone after half a minute.
SILENCE_S = 6.0
CLOSE_TIMEOUT_S = 3.0
ENDS = {"failed": "the connection failed", "closed": "the server closed the connection"}


@dataclass(frozen=True, slots=True)
class Refusal:
    """An offer that was answered with no. refused_ms: from sending it to the answer."""

    session: int
    status: int
    code: str
    message: str
    retry_after_s: float | None
    refused_ms: float


class ClipSender(RTCRtpSender):
    """Sends the payloads of a ClipTrack; nothing is encoded."""

    def __init__(self, track: ClipTrack, transport: RTCDtlsTransport) -> None:
        super().__init__(track, transport)
        self._clip_track = track

    async def _next_encoded_frame(self, codec: RTCRtpCodecParameters) -> RTCEncodedFrame | None:
        """Called by the stock loop, which sends what is returned."""
        frame, ticks = await self._clip_track.next()
        return RTCEncodedFrame(list(frame.payloads), ticks & 0xFFFFFFFF, 0)

    def _send_keyframe(self) -> None:
        self._clip_track.ask_key_frame()


class NotingOrder(FrameOrder):
    """Tells of every frame in its order; hands on only what is to be decoded."""

    def __init__(
        self, hole_deadline_s: float, counters: Counter[str], note: Callable[[EncodedFrame], None], *, decodes: bool
    ) -> None:
        super().__init__(is_vp8_key_frame, hole_deadline_s, counters)
        self._note = note
        self._decodes = decodes

    def take(self, now: float) -> list[EncodedFrame]:
        """See FrameOrder."""
        frames = super().take(now)
        for frame in frames:
            self._note(frame)
        return frames if self._decodes else []


class PictureReceiver(MediaReceiver):
    """The server's receiver, which notes pictures before a decoder sees them."""

    def __init__(
        self,
        transport: RTCDtlsTransport,
        pool: Executor,
        counters: Counter[str],
        note: Callable[[EncodedFrame], None],
        *,
        decodes: bool,
    ) -> None:
        settings = MediaSettings()
        super().__init__("video", transport, pool, settings, counters, self._take_picture, lambda: None)
        self._hole_deadline_s = settings.hole_deadline_s
        self._note = note
        self._decodes = decodes

    def _order_for(self, codec: RTCRtpCodecParameters) -> FrameOrder | PacketOrder:
        if self._order is None or codec is not self._codec:
            self._codec = codec
            self._order = NotingOrder(self._hole_deadline_s, self._counters, self._note, decodes=self._decodes)
        return self._order

    def _take_picture(self, picture: object, arrived_at: float) -> None:
        self._counters["pictures_decoded"] += 1


class LoadClient:
    """One session from its offer to its goodbye. `open` first, `close` always."""

    def __init__(
        self,
        session: int,
        base_url: str,
        http: aiohttp.ClientSession,
        clip: EncodedClip,
        pool: Executor,
        clock: ServerClock,
        *,
        decodes: bool,
    ) -> None:
        self.session = session
        self.figures = SessionFigures(clock)
        self.counters: Counter[str] = Counter()
        self.errors: list[str] = []
        self._api = Api(base_url, http=http)
        self._url = ""
        self._closing = False
        self._settled = asyncio.Event()
        self.ended_at: float | None = None
        """When the session ended without `close`, in monotonic seconds; `errors` says why."""
        self._pings: dict[int, float] = {}
        self._heard_at = float("inf")
        self._tasks: set[asyncio.Task[None]] = set()
        configuration = RTCConfiguration(iceServers=[], bundlePolicy=RTCBundlePolicy.MAX_BUNDLE)
        self._connection = RTCPeerConnection(configuration)
        self._install(ClipTrack(clip, session, self.figures.sent.on_sent, self.counters), pool, decodes=decodes)
        self._control = self._connection.createDataChannel("control")
        self._telemetry = self._connection.createDataChannel("telemetry", ordered=False, maxRetransmits=0)
        self._control.on("open", self._on_control_open)
        self._control.on("close", lambda: self._end("the server closed the control channel"))
        self._control.on("message", self._on_message)
        self._telemetry.on("message", self._on_message)
        self._connection.on("connectionstatechange", self._on_state)

    async def open(self, params: dict[str, object]) -> Refusal | None:
        """Offer, with the session's parameters; returns the refusal, or None when the server answered.

        What else goes wrong is in `errors`.
        """
        await self._connection.setLocalDescription(await self._connection.createOffer())
        offered_at = time.monotonic()
        self.figures.on_offer(offered_at)
        try:
            answer = await self._api.offer(self._connection.localDescription.sdp, params)
            self.figures.on_answer(time.monotonic())
            self._url = answer.url
            await self._connection.setRemoteDescription(RTCSessionDescription(answer.sdp, "answer"))
        except Refused as refused:
            refused_ms = round(1000 * (time.monotonic() - offered_at), 1)
            return Refusal(self.session, refused.status, refused.code, str(refused), refused.retry_after_s, refused_ms)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._end(f"the offer failed: {error or type(error).__name__}")
        except (ValueError, KeyError, TypeError) as error:
            self._end(f"the answer could not be read: {error!r}")
        return None

    async def until_restyled(self, timeout_s: float) -> None:
        """Wait for the first restyled picture, the session's end, or `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._settled.wait()

    async def close(self) -> None:
        """Say goodbye, which frees the seat at once, and close everything, each step with a timeout."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        if self._url:
            await self._step("goodbye", self._goodbye())
        transports = [item.receiver.transport for item in self._connection.getTransceivers()]
        readers = {item._task for item in transports if item._task is not None}
        await self._step("connection", self._connection.close())
        for transport in transports:
            await self._step("dtls", transport.stop())
            await self._step("ice", transport.transport.stop())
        if left := {*readers, *self._tasks}:
            _, late = await asyncio.wait(left, timeout=CLOSE_TIMEOUT_S)
            for straggler in late:
                straggler.cancel()

    def _install(self, track: ClipTrack, pool: Executor, *, decodes: bool) -> None:
        """Put our sender and receiver in the place of the stock ones, as server/peer.py does, and VP8 alone."""
        transceiver = self._connection.addTransceiver("video")
        transport = transceiver.receiver.transport
        IceGuard(self.counters).attach(transport.transport.iceGatherer)
        sender = ClipSender(track, transport)
        receiver = PictureReceiver(transport, pool, self.counters, self._on_picture, decodes=decodes)
        receiver._set_rtcp_ssrc(sender._ssrc)
        transceiver._RTCRtpTransceiver__sender = sender  # type: ignore[attr-defined]
        transceiver._RTCRtpTransceiver__receiver = receiver  # type: ignore[attr-defined]
        codecs = RTCRtpSender.getCapabilities("video").codecs
        transceiver.setCodecPreferences([codec for codec in codecs if codec.mimeType in ("video/VP8", "video/rtx")])

    def _on_picture(self, frame: EncodedFrame) -> None:
        self.figures.on_picture(frame.timestamp, frame.arrived_at)
        self._note_restyled()

    def _note_restyled(self) -> None:
        if self.figures.has_restyled:
            self._settled.set()

    def _on_control_open(self) -> None:
        self._start(self._ping())

    async def _ping(self) -> None:
        """Measure the server's clock, as the page does, and notice when it falls silent."""
        number = 0
        self._heard_at = time.monotonic()
        while self._control.readyState == "open":
            if time.monotonic() - self._heard_at > SILENCE_S:
                self._end(f"the server was silent for {SILENCE_S:g} s")
            number += 1
            now = self._pings[number] = time.monotonic()
            self._pings.pop(number - 10, None)
            with contextlib.suppress(ConnectionError):
                self._control.send(json.dumps({"v": 1, "type": "ping", "id": number, "t_ms": 1000 * now}))
            await asyncio.sleep(PING_PERIOD_S)

    def _on_message(self, text: str | bytes) -> None:
        """A message of either channel. One that is not as the protocol says is counted: raising would end DTLS."""
        self._heard_at = time.monotonic()
        try:
            self._take(json.loads(text), self._heard_at)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            self.counters["messages_malformed"] += 1

    def _take(self, message: dict[str, Any], now: float) -> None:
        kind = message["type"]
        if kind == "pong":
            sent_at = self._pings.pop(message["id"], None)
            if sent_at is not None:
                self.figures.clock.on_pong(sent_at, now, message["server_s"])
        elif kind == "stats":
            self.figures.on_stats(message, now)
        elif kind == "marks":
            self.figures.on_marks(message["frames"])
            self._note_restyled()
        elif kind == "notice":
            self.figures.on_notice(str(message["code"]))
        elif kind == "error":
            self.errors.append(f"{message['code']}: {message['message']}")

    def _on_state(self) -> None:
        state = self._connection.connectionState
        if state == "connected":
            self.figures.on_connected(time.monotonic())
        elif state in ENDS:
            self._end(ENDS[state])

    def _end(self, why: str) -> None:
        if self._closing or self.ended_at is not None:
            return
        self.errors.append(why)
        self.ended_at = time.monotonic()
        self._settled.set()

    async def _goodbye(self) -> None:
        try:
            await self._api.close(self._url)
        except Refused as refused:
            if refused.status != 404:
                self.errors.append(f"the goodbye was answered {refused.status}")

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _step(self, name: str, step: Awaitable[None]) -> None:
        try:
            await asyncio.wait_for(step, CLOSE_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001  (the wall: no step may keep the next from running)
            self.errors.append(f"closing ({name}) failed: {error!r}")
