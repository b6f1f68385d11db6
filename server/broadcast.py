"""One stream for many viewers: what a publisher's session releases is encoded once a codec and sent to everyone.

    session -> Broadcast.push -> a Lane per codec that somebody watches -> a Subscription per viewer -> its sender

A viewer may ask for the person alone (matte.py): that is another form of the picture, with lanes of its own.

Without viewers nothing is encoded. A broadcast outlives its publisher: while nobody publishes, viewers see the last
picture, darkened, once a second, and the picture goes on when a publisher returns.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace

import av
from aiortc import RTCDtlsTransport, RTCRtpSender
from aiortc.codecs import depayload
from aiortc.mediastreams import MediaStreamError, MediaStreamTrack
from aiortc.rtcrtpparameters import RTCRtpCodecParameters
from aiortc.rtcrtpsender import RTCEncodedFrame
from aiortc.rtp import (
    RTCP_PSFB_APP,
    AnyRtcpPacket,
    RtcpPsfbPacket,
    unpack_remb_fci,
)

from server.egress import OutgoingVideo, ReleasedFrame
from server.encoding import AUDIO_RATE, AudioEncoder, BitratePolicy, VideoEncoder
from server.frames import OutgoingFrame
from server.matte import Cutter, Form, MatteProcess
from server.peer import Peer
from server.reassembly import is_h264_key_frame, is_vp8_key_frame
from server.repeats import RepeatingSender
from server.settings import MediaSettings

log = logging.getLogger(__name__)

# Frames that wait for one viewer's sender: a third of a second of pictures, half a second of sound.
MAX_HELD = {"video": 8, "audio": 25}
KEY_FRAME_INTERVAL_S = 0.3
REPEAT_S = 1.0


@dataclass(frozen=True, slots=True)
class Encoded:
    """One frame as it goes to every viewer. ticks: 90 kHz for pictures, 48 kHz for sound."""

    payloads: list[bytes]
    ticks: int
    key_frame: bool = True
    audio_level: int = 0


class Subscription(MediaStreamTrack):
    """What waits for one viewer in one media section: `push` never waits, the number held is bounded.

    A viewer begins with a key frame. One whose pictures pile up loses those and goes on from the next key frame
    (`viewer_frames_dropped`; what it skips until then, `viewer_frames_skipped`); sound loses its oldest.
    """

    def __init__(self, kind: str, counters: Counter[str], on_stop: Callable[[Subscription], None]) -> None:
        super().__init__()
        self.kind = kind
        self._counters = counters
        self._on_stop = on_stop
        self._held: deque[Encoded] = deque()
        self._ready = asyncio.Event()
        self._awaits_key_frame = kind == "video"

    def push(self, frame: Encoded) -> bool:
        """Take a frame; returns whether a key frame has to come before there is anything to send again."""
        if self._awaits_key_frame and not frame.key_frame:
            self._counters["viewer_frames_skipped"] += 1
            return True
        self._awaits_key_frame = False
        if len(self._held) >= MAX_HELD[self.kind]:
            if self.kind == "video":
                self._counters["viewer_frames_dropped"] += len(self._held) + 1
                self._held.clear()
                self._awaits_key_frame = True
                return True
            self._held.popleft()
            self._counters["viewer_sound_dropped"] += 1
        self._held.append(frame)
        self._ready.set()
        return False

    async def next(self) -> Encoded:
        """Wait for the oldest frame held.

        Raises: MediaStreamError, once stopped.
        """
        while not self._held:
            if self.readyState != "live":
                raise MediaStreamError
            self._ready.clear()
            await self._ready.wait()
        return self._held.popleft()

    async def recv(self) -> av.VideoFrame:
        """Nothing for a stock sender: frames come encoded, by `next`."""
        raise MediaStreamError

    def stop(self) -> None:
        """End it; who waits in `next` is told, and nothing is encoded for it any more."""
        super().stop()
        self._on_stop(self)
        self._ready.set()


class Lane:
    """One encoder and those who watch its codec. Lives while somebody does."""

    def __init__(
        self, codec: RTCRtpCodecParameters, settings: MediaSettings, executor: Executor, counters: Counter[str]
    ) -> None:
        self.subscriptions: dict[Subscription, int | None] = {}
        """With each the bitrate that its viewer says it can take, once it has said so."""
        self._codec = codec
        self._executor = executor
        self._counters = counters
        self._pictures = OutgoingVideo(counters)
        self._policy = BitratePolicy(settings.start_bitrate, settings.min_bitrate, settings.max_bitrate)
        self._key_frame_asked = False
        self._key_frame_at = float("-inf")
        self._task = asyncio.create_task(self._run(), name=f"broadcast/{codec.name.lower()}")

    def push(self, frame: OutgoingFrame, now: float) -> None:
        """Hand a picture to the encoder; two wait at most, a third drops the oldest, `outgoing_dropped`."""
        self._pictures.push(frame, now)

    def ask_key_frame(self) -> None:
        """Have a key frame soon: at most one is made on demand in KEY_FRAME_INTERVAL_S, for all who ask."""
        self._key_frame_asked = True

    def report(self, subscription: Subscription, bitrate: int, now: float) -> None:
        """Take what a viewer says it can take.

        The lane follows the median of its viewers: one bad line does not spoil the picture of the others, and a
        picture that most can take is what is sent.
        """
        if subscription in self.subscriptions:
            self.subscriptions[subscription] = bitrate
            estimates = [estimate for estimate in self.subscriptions.values() if estimate is not None]
            self._policy.report(int(statistics.median_low(estimates)), now)

    def stop(self) -> None:
        """End the encoder; an encode that runs ends in the pool and its result is dropped."""
        self._task.cancel()

    async def _run(self) -> None:
        encoder = VideoEncoder(self._codec)
        while True:
            released = await self._pictures.next()
            try:
                frame = await self._encoded(encoder, released)
            except Exception:  # the wall: a picture that cannot be encoded is lost, the stream is not
                self._counters["encode_errors"] += 1
                log.exception("a picture of a broadcast could not be encoded")
                encoder = VideoEncoder(self._codec)
                continue
            if frame is None:
                self._counters["encoder_skipped"] += 1
                continue
            for subscription in self.subscriptions:
                if subscription.push(frame):
                    self.ask_key_frame()

    async def _encoded(self, encoder: VideoEncoder, released: ReleasedFrame) -> Encoded | None:
        now = time.monotonic()
        key_frame = self._key_frame_asked and now - self._key_frame_at >= KEY_FRAME_INTERVAL_S
        if key_frame:
            self._key_frame_asked, self._key_frame_at = False, now
            self._counters["key_frames_asked"] += 1
        payloads = await asyncio.get_running_loop().run_in_executor(
            self._executor, encoder.encode, released.frame.rgb, released.ticks, self._policy.bitrate(now), key_frame
        )
        if not payloads:
            return None
        self._policy.sent(8 * sum(map(len, payloads)), now)
        self._counters["frames_encoded"] += 1
        return Encoded(payloads, released.ticks, self._is_key_frame(payloads))

    def _is_key_frame(self, payloads: list[bytes]) -> bool:
        """A change of bitrate or size makes one too, so the stream itself is asked."""
        data = b"".join(depayload(self._codec, payload) for payload in payloads)
        return is_vp8_key_frame(data) if self._codec.name.lower() == "vp8" else is_h264_key_frame(data)


class Broadcast:
    """One published stream. It is the outlet of the publisher's session; `close` when the stream is over."""

    def __init__(self, settings: MediaSettings, executor: Executor, matte: MatteProcess) -> None:
        self.counters: Counter[str] = Counter()
        """What was encoded, sent to viewers and dropped, by name; read only."""
        self._settings = settings
        self._executor = executor
        self._matte = matte
        self._cutter: Cutter | None = None
        self._lanes: dict[tuple[str, Form], Lane] = {}
        self._listeners: set[Subscription] = set()
        self._born_at = time.monotonic()
        self._last: OutgoingFrame | None = None
        self._pushed_at = 0.0
        self._task = asyncio.create_task(self._stand_in(), name="broadcast/stand-in")

    # --- from the publisher's session

    def push(self, frame: OutgoingFrame) -> None:
        """Release a picture to everyone who watches. Never waits, never raises."""
        self._last, self._pushed_at = frame, time.monotonic()
        self._deliver(Form.PLAIN, frame)
        if self._cutter is not None:
            self._cutter.push(frame)

    def _deliver(self, form: Form, frame: OutgoingFrame) -> None:
        now = time.monotonic()
        for (_, wanted), lane in self._lanes.items():
            if wanted is form:
                lane.push(frame, now)

    def _cut_forms(self) -> set[Form]:
        return {form for _, form in self._lanes if form is not Form.PLAIN}

    async def serve(self, peer: Peer) -> None:
        """Carry the publisher's sound for as long as it is there; its pictures come by `push`."""
        encoder = AudioEncoder()
        shift: int | None = None
        try:
            while (sound := await peer.next_sound()) is not None:
                if not self._listeners:
                    shift = None
                    continue
                packets = await asyncio.get_running_loop().run_in_executor(self._executor, encoder.encode, sound)
                for ticks, payload, level in packets:
                    if shift is None:
                        # The publisher's clock is another one at its return; the viewers' goes on.
                        shift = round((time.monotonic() - self._born_at) * AUDIO_RATE) - ticks
                    self._send_sound(Encoded([payload], ticks + shift, audio_level=level))
            await peer.wait_until_gone()
        finally:
            if self._last is not None:
                self._last = replace(self._last, rgb=self._last.rgb // 2)

    def _send_sound(self, packet: Encoded) -> None:
        self.counters["sound_encoded"] += 1
        for listener in self._listeners:
            listener.push(packet)

    # --- to the viewers

    def subscribe(self, subscription: Subscription, codec: RTCRtpCodecParameters, form: Form) -> Lane | None:
        """Send to a viewer from now on; returns the lane of a video subscription."""
        if subscription.readyState != "live":
            return None
        if subscription.kind == "audio":
            self._listeners.add(subscription)
            return None
        lane = self._lanes.get((codec.name, form))
        if lane is None:
            lane = self._lanes[codec.name, form] = Lane(codec, self._settings, self._executor, self.counters)
        if form is not Form.PLAIN and self._cutter is None:
            self._cutter = Cutter(self._matte, self._executor, self.counters, self._cut_forms, self._deliver)
        lane.subscriptions[subscription] = None
        lane.ask_key_frame()
        if self._last is not None and form is Form.PLAIN:
            lane.push(self._last, time.monotonic())
        elif self._last is not None and self._cutter is not None:
            self._cutter.push(self._last)
        return lane

    def unsubscribe(self, subscription: Subscription) -> None:
        """Send nothing more; the last one of a codec ends its encoder. Harmless when repeated."""
        self._listeners.discard(subscription)
        for key, lane in list(self._lanes.items()):
            lane.subscriptions.pop(subscription, None)
            if not lane.subscriptions:
                lane.stop()
                del self._lanes[key]
        if self._cutter is not None and not self._cut_forms():
            self._cutter.stop()
            self._cutter = None

    def close(self) -> None:
        """End every subscription and encoder."""
        self._task.cancel()
        for subscription in [*self._listeners, *(one for lane in self._lanes.values() for one in lane.subscriptions)]:
            subscription.stop()

    async def _stand_in(self) -> None:
        """While no picture comes, send the last one again, so that who arrives sees something."""
        while True:
            await asyncio.sleep(REPEAT_S)
            now = time.monotonic()
            if self._last is not None and now - self._pushed_at >= REPEAT_S:
                self.counters["frames_repeated"] += len(self._lanes)
                self._deliver(Form.PLAIN, self._last)
                if self._cutter is not None:
                    self._cutter.push(self._last)


class Feed:
    """The senders of one viewer. `stop` always."""

    def __init__(self, broadcast: Broadcast, form: Form = Form.PLAIN) -> None:
        self._broadcast = broadcast
        self._form = form
        self._subscriptions: list[Subscription] = []

    def sender(self, kind: str, transport: RTCDtlsTransport) -> RTCRtpSender:
        """The sender of one media section; it takes part once the viewer is connected."""
        subscription = Subscription(kind, self._broadcast.counters, self._broadcast.unsubscribe)
        self._subscriptions.append(subscription)
        return ViewerSender(subscription, transport, self._broadcast, self._form)

    def stop(self) -> None:
        """Send nothing more."""
        for subscription in self._subscriptions:
            subscription.stop()


class ViewerSender(RepeatingSender):
    """Sends what was encoded for all."""

    def __init__(
        self, subscription: Subscription, transport: RTCDtlsTransport, broadcast: Broadcast, form: Form
    ) -> None:
        super().__init__(subscription, transport, broadcast.counters)
        self._subscription = subscription
        self._form = form
        self._broadcast = broadcast
        self._subscribed = False
        self._lane: Lane | None = None

    async def _next_encoded_frame(self, codec: RTCRtpCodecParameters) -> RTCEncodedFrame | None:
        """Called by the stock loop, from the connection on."""
        if not self._subscribed:
            self._subscribed = True
            self._lane = self._broadcast.subscribe(self._subscription, codec, self._form)
        frame = await self._subscription.next()
        if not self._enabled:
            return None
        self._broadcast.counters[f"{self.kind}_frames_sent"] += 1
        return RTCEncodedFrame(frame.payloads, frame.ticks & 0xFFFFFFFF, frame.audio_level)

    async def _handle_rtcp_packet(self, packet: AnyRtcpPacket) -> None:
        if isinstance(packet, RtcpPsfbPacket) and packet.fmt == RTCP_PSFB_APP:
            try:
                bitrate, sources = unpack_remb_fci(packet.fci)
            except ValueError:
                self._broadcast.counters["rtcp_malformed"] += 1
                return
            if self._ssrc in sources and self._lane is not None:
                self._lane.report(self._subscription, bitrate, time.monotonic())
            return
        await super()._handle_rtcp_packet(packet)

    def _send_keyframe(self) -> None:
        if self._lane is not None:
            self._lane.ask_key_frame()
