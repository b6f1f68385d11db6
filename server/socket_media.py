"""A session over one WebSocket, for networks that let no UDP through: slower to forgive loss, but it comes through.

Everything is as over WebRTC (docs/protocol.md): the same session, controls, marks, figures and resume token; sound
alone is left out. Text messages are those of both data channels. Binary messages are a kind, a number and a picture:

    kind, 1 byte     1 picture that needs the ones before it, 2 key picture, 3 receipt of a picture
    number, 4 bytes  big endian; of pictures of the page: counted up; of the server: RTP timestamp, as in the marks

TCP delivers everything, late: what is sent into a slow line only makes the picture old. So either side has at most
MAX_IN_FLIGHT pictures without a receipt, the oldest for LAG_S at most, and pictures that find no room are not encoded
at all: the newest wins. How much the line carries decides the bitrate.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import struct
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Literal

import av
import numpy as np
from aiohttp import WSCloseCode, WSMsgType, web
from aiortc.mediastreams import VIDEO_TIME_BASE
from aiortc.rtcrtpparameters import RTCRtpCodecParameters
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from pydantic import Field

from server.channels import MAX_MESSAGE_BYTES, MAX_MESSAGES
from server.decoding import Decoder, PictureTooLargeError
from server.egress import OutgoingVideo
from server.encoding import VideoEncoder
from server.errors import ServerError
from server.frames import CameraFrame, FrameMark, OutgoingFrame
from server.reassembly import EncodedFrame
from server.resume import Wish
from server.settings import MediaSettings

log = logging.getLogger(__name__)

HEADER = struct.Struct(">BI")
PICTURE, KEY_PICTURE, RECEIPT = 1, 2, 3
MAX_PICTURE_BYTES = 1024 * 1024
MAX_IN_FLIGHT = 12
LAG_S = 0.4
MAX_UNDECODED = MAX_IN_FLIGHT + 4
MAX_TEXTS = 64
MAX_MARKS = 256
# As many damaged pictures in a row end the input.
MAX_DAMAGED = 50
HELLO_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 3.0
RATE_PERIOD_S = 1.0
SPARE = 0.85
RISE, RISE_PERIODS = 1.25, 5
JPEG_QUALITY = 5
Format = Literal["vp8", "jpeg"]


class Hello(Wish):
    """First message of a page. sends, shows: the format of its pictures, and of those it can show."""

    type: Literal["hello"]
    v: int = 1
    sends: Format = "vp8"
    shows: Format = "vp8"
    told: str = Field(default="", max_length=200, description="why there is no WebRTC, for the log")


def read_hello(text: str) -> Hello:
    """Raises pydantic.ValidationError."""
    return Hello.model_validate_json(text)


class JpegEncoder:
    """Pictures -> JPEG, for browsers without WebCodecs. Not for two threads at once."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()

    def encode_whole(self, rgb: NDArray[np.uint8], ticks: int, bitrate: int, key_frame: bool) -> list[av.Packet[Any]]:
        """As VideoEncoder; the quality is fixed, and every picture stands alone."""
        height, width = rgb.shape[0] & ~1, rgb.shape[1] & ~1
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb[:height, :width]), format="rgb24")
        planar = self._reformatter.reformat(picture, format="yuvj420p", threads=1)
        context = av.CodecContext.create("mjpeg", "w")
        context.width, context.height, context.pix_fmt = width, height, "yuvj420p"
        context.time_base = VIDEO_TIME_BASE
        context.qmin = context.qmax = JPEG_QUALITY
        return [*context.encode(planar), *context.encode(None)]


class Line:
    """What is under way to a page, and what that says of the line. Pure: instants are passed in."""

    def __init__(self, settings: MediaSettings) -> None:
        self.bitrate = settings.start_bitrate
        """What to encode the next picture at, bit/s. A change costs a key picture: it falls at once and rises late."""
        self._bounds = settings.min_bitrate, settings.max_bitrate
        self._free_periods = 0
        self._sent: dict[int, tuple[float, int]] = {}
        self._period_from: float | None = None
        self._received_bits = 0
        self._was_held = False

    def has_room(self, now: float) -> bool:
        """Whether another picture may go out."""
        oldest = next(iter(self._sent.values()), None)
        room = len(self._sent) < MAX_IN_FLIGHT and (oldest is None or now - oldest[0] < LAG_S)
        self._was_held |= not room
        return room

    def sent(self, number: int, size: int, now: float) -> None:
        """A picture of `size` bytes goes out."""
        self._sent[number] = (now, size)

    def received(self, number: int, now: float) -> None:
        """The page has taken a picture, and with it all that were sent before."""
        if number not in self._sent:
            return
        while self._sent:
            oldest = next(iter(self._sent))
            self._received_bits += 8 * self._sent.pop(oldest)[1]
            if oldest == number:
                break
        if self._period_from is None:
            self._period_from = now
        if (period_s := now - self._period_from) >= RATE_PERIOD_S:
            self._adapt(self._received_bits / period_s)
            self._period_from, self._received_bits, self._was_held = now, 0, False

    def _adapt(self, carried: float) -> None:
        """After a period that carried so many bit/s."""
        self._free_periods = 0 if self._was_held else self._free_periods + 1
        wanted = self.bitrate
        if self._was_held:
            wanted = min(wanted, int(SPARE * carried))
        elif self._free_periods >= RISE_PERIODS:
            wanted, self._free_periods = int(RISE * wanted), 0
        self.bitrate = min(max(wanted, self._bounds[0]), self._bounds[1])


class SocketPeer:
    """The page at the other end of a WebSocket; a `Link` of its session, as `Peer` is."""

    def __init__(self, socket: web.WebSocketResponse, hello: Hello, settings: MediaSettings) -> None:
        self.answer_sdp = ""
        self.video_delay_s = 0.0
        self.connected_at: float | None = time.monotonic()
        self.has_sound = False
        self.on_sound: Callable[[av.AudioFrame, float], None] | None = None
        self.ended = asyncio.Event()
        """Set once nothing more goes through the socket."""
        self.last_packet_at = time.monotonic()
        self.counters: Counter[str] = Counter()
        self._socket = socket
        self._settings = settings
        self._sends: Format = hello.sends
        self._shows: Format = hello.shows
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="socket-codec")
        self._decoder = Decoder(_codec(hello.sends), settings.max_input_pixels)
        self._line = Line(settings)
        self._room = asyncio.Event()
        self._pictures = OutgoingVideo(self.counters)
        self._marks: deque[FrameMark] = deque(maxlen=MAX_MARKS)
        self._texts: deque[str] = deque()
        self._has_text = asyncio.Event()
        self._welcomed = asyncio.Event()
        self._messages: deque[str] = deque()
        self._has_message = asyncio.Event()
        self._undecoded: deque[tuple[int, EncodedFrame]] = deque()
        self._has_undecoded = asyncio.Event()
        self._awaits_key = hello.sends == "vp8"
        self._key_asked = False
        self._slot: CameraFrame | None = None
        self._slot_changed = asyncio.Event()
        self._decoded = 0
        self._input_ended = False
        self._gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    # --- what a session asks of a connection

    async def next_frame(self) -> CameraFrame | None:
        """As `Peer.next_frame`."""
        while self._slot is None:
            if self._input_ended:
                return None
            self._slot_changed.clear()
            await self._slot_changed.wait()
        frame, self._slot = self._slot, None
        return frame

    def send_frame(self, frame: OutgoingFrame) -> None:
        """As `Peer.send_frame`: two wait for room at most, the newest win."""
        self._pictures.push(frame, time.monotonic())

    def take_marks(self) -> list[FrameMark]:
        """As `Peer.take_marks`."""
        marks = list(self._marks)
        self._marks.clear()
        return marks

    def take_unsent(self) -> list[tuple[int, str]]:
        """As `Peer.take_unsent`."""
        unsent = list(self._pictures.unsent)
        self._pictures.unsent.clear()
        return unsent

    async def next_message(self) -> str | None:
        """As `Peer.next_message`."""
        while not self._messages:
            if self._gone.done():
                return None
            self._has_message.clear()
            await self._has_message.wait()
        return self._messages.popleft()

    def send_control(self, text: str) -> None:
        """Send a text; at most MAX_TEXTS wait, a further one drops the oldest, counted `control_unsent`."""
        if len(self._texts) >= MAX_TEXTS:
            self._texts.popleft()
            self.counters["control_unsent"] += 1
        self._texts.append(text)
        self._has_text.set()

    def send_telemetry(self, text: str) -> None:
        """Send a text unless others wait already; counted `telemetry_unsent`."""
        if len(self._texts) >= MAX_TEXTS // 4:
            self.counters["telemetry_unsent"] += 1
        else:
            self.send_control(text)

    async def add_candidates(self, candidates: Sequence[Mapping[str, object]]) -> None:
        """There are none here."""
        self.counters["candidates_refused"] += len(candidates)

    async def wait_until_gone(self) -> str:
        """As `Peer.wait_until_gone`; a socket that broke is `failed`, and its page may come back."""
        return await asyncio.shield(self._gone)

    def welcome(self, text: str) -> None:
        """Send the first text; nothing else goes out before it."""
        self._texts.appendleft(text)
        self._has_text.set()
        self._welcomed.set()

    # --- from the page

    async def _receive(self) -> None:
        while True:
            try:
                message = await self._socket.receive(timeout=self._settings.vanish_timeout_s)
            except TimeoutError:
                return self._leave("vanished")
            self.last_packet_at = time.monotonic()
            match message.type:
                case WSMsgType.BINARY:
                    self._take_binary(message.data)
                case WSMsgType.TEXT:
                    self._take_text(message.data)
                case WSMsgType.CLOSE:
                    return self._leave("closed_by_peer")
                case _:
                    return self._leave("failed")

    def _take_text(self, text: str) -> None:
        if len(text) > MAX_MESSAGE_BYTES or len(text.encode(errors="replace")) > MAX_MESSAGE_BYTES:
            self.counters["messages_refused"] += 1
            return
        if len(self._messages) >= MAX_MESSAGES:
            self._messages.popleft()
            self.counters["control_dropped"] += 1
        self._messages.append(text)
        self._has_message.set()

    def _take_binary(self, data: bytes) -> None:
        if len(data) < HEADER.size:
            self.counters["messages_refused"] += 1
            return
        kind, number = HEADER.unpack_from(data)
        if kind == RECEIPT:
            self._line.received(number, time.monotonic())
            self._room.set()
        elif kind in (PICTURE, KEY_PICTURE) and len(data) > HEADER.size:
            self._take_encoded(number, data[HEADER.size :], is_key=kind == KEY_PICTURE or self._sends == "jpeg")
        else:
            self.counters["messages_refused"] += 1

    def _take_encoded(self, number: int, data: bytes, *, is_key: bool) -> None:
        if self._awaits_key and not is_key:
            self.counters["frames_without_key"] += 1
            return
        self._awaits_key = False
        if len(self._undecoded) >= MAX_UNDECODED:
            # Only a page that ignores its receipts comes here.
            self.counters["frames_undecoded"] += len(self._undecoded)
            self._undecoded.clear()
            if not is_key:
                self._ask_for_key()
                return
        self._undecoded.append((number, EncodedFrame(data, number * 3000 & 0xFFFFFFFF, time.monotonic())))
        self._has_undecoded.set()

    def _ask_for_key(self) -> None:
        self._awaits_key = self._sends == "vp8"
        if self._awaits_key:
            self.counters["key_frames_asked"] += 1
            self.send_control(json.dumps({"v": 1, "type": "key_frame"}))

    async def _decode(self) -> None:
        loop = asyncio.get_running_loop()
        damaged = 0
        while not self._input_ended:
            while not self._undecoded:
                self._has_undecoded.clear()
                await self._has_undecoded.wait()
            number, encoded = self._undecoded.popleft()
            try:
                pictures = await loop.run_in_executor(self._pool, self._decoder.decode, encoded)
                damaged = 0
            except PictureTooLargeError:
                self.counters["input_too_large"] += 1
                self._end_input()
                return
            except av.FFmpegError:
                damaged += 1
                self.counters["frames_damaged"] += 1
                if damaged >= MAX_DAMAGED:
                    self.counters["input_undecodable"] += 1
                    self._end_input()
                    return
                pictures = []
                self._ask_for_key()
            await self._socket.send_bytes(HEADER.pack(RECEIPT, number))
            for picture in pictures:
                assert isinstance(picture, av.VideoFrame)
                if self._slot is not None:
                    self.counters["camera_overwritten"] += 1
                self._slot = CameraFrame(self._decoded, encoded.arrived_at, picture)
                self._decoded += 1
                self._slot_changed.set()

    def _end_input(self) -> None:
        self._input_ended = True
        self._slot_changed.set()

    # --- to the page

    async def _send_texts(self) -> None:
        await self._welcomed.wait()
        while True:
            while self._texts:
                await self._socket.send_str(self._texts.popleft())
            self._has_text.clear()
            await self._has_text.wait()

    async def _send_pictures(self) -> None:
        await self._welcomed.wait()
        loop = asyncio.get_running_loop()
        encoder = VideoEncoder(_codec("vp8")) if self._shows == "vp8" else JpegEncoder()
        while True:
            while not self._line.has_room(time.monotonic()):
                self._room.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LAG_S):
                        await self._room.wait()
            released = await self._pictures.next()
            bitrate = self._line.bitrate
            packets = await loop.run_in_executor(
                self._pool, encoder.encode_whole, released.frame.rgb, released.ticks, bitrate, False
            )
            if not packets:
                self.counters["encoder_skipped"] += 1
                self._pictures.unsent.append((released.frame.index, "encoder_skipped"))
                continue
            data, stamp = b"".join(map(bytes, packets)), released.ticks & 0xFFFFFFFF
            kind = KEY_PICTURE if self._shows == "jpeg" or any(packet.is_keyframe for packet in packets) else PICTURE
            self._line.sent(stamp, len(data), time.monotonic())
            await self._socket.send_bytes(HEADER.pack(kind, stamp) + data)
            frame = released.frame
            self._marks.append(FrameMark(stamp, frame.index, frame.arrived_at, released.released_at, frame.kind))
            self.counters["frames_sent"] += 1

    # --- lifetime

    def _leave(self, reason: str) -> None:
        if not self._gone.done():
            self._gone.set_result(reason)
        self._end_input()
        self._has_message.set()

    async def _work(self) -> None:
        """Everything that goes through the socket; whatever breaks it ends this connection and nothing else."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for work in (self._receive, self._decode, self._send_texts, self._send_pictures):
                    tasks.create_task(work(), name=f"socket/{work.__name__.strip('_')}")
                await self.wait_until_gone()
                raise _Over
        except* _Over:
            pass
        except* Exception as group:  # noqa: BLE001  (the wall)
            self.counters["socket_errors"] += 1
            log.info("a WebSocket of a session broke: %r", group.exceptions[0])
            self._leave("failed")

    async def _close(self, work: asyncio.Task[None]) -> None:
        while self._texts and self._welcomed.is_set() and not self._gone.done():
            with contextlib.suppress(Exception):  # the last words, say of a server that stops
                await asyncio.wait_for(self._socket.send_str(self._texts.popleft()), CLOSE_TIMEOUT_S)
        self._leave("closed_by_peer")
        work.cancel()
        await asyncio.wait([work])
        self._pictures.stop()
        with contextlib.suppress(Exception):  # it may be broken already
            await asyncio.wait_for(self._socket.close(code=WSCloseCode.OK, drain=False), CLOSE_TIMEOUT_S)
        self.ended.set()
        await asyncio.get_running_loop().run_in_executor(None, self._pool.shutdown)


class _Over(Exception):
    """Ends the task group of a connection whose page is gone."""


@asynccontextmanager
async def open_socket(
    socket: web.WebSocketResponse, hello: Hello, settings: MediaSettings, made: asyncio.Future[SocketPeer]
) -> AsyncIterator[SocketPeer]:
    """Hold the connection for the body of the `async with`; everything of it has ended on exit.

    made: gets the peer, for who answers the page. Raises: ServerError, when a socket is used a second time.
    """
    if made.done():
        # The session that the page came back to ended at that moment, and closed its socket.
        raise ServerError("the session has just ended; connect again", code="session_gone", status=503)
    peer = SocketPeer(socket, hello, settings)
    made.set_result(peer)
    work = asyncio.create_task(peer._work(), name="socket/work")
    try:
        yield peer
    finally:
        await asyncio.shield(asyncio.create_task(peer._close(work), name="socket/close"))


def _codec(name: Format) -> RTCRtpCodecParameters:
    return RTCRtpCodecParameters(mimeType=f"video/{name.upper()}", clockRate=90000, payloadType=96)
