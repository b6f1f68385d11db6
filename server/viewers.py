"""One viewer of a broadcast: what waits for it, what its network takes, and the senders of its connection."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import av
from aiortc import RTCDtlsTransport, RTCRtpSender
from aiortc.mediastreams import MediaStreamError, MediaStreamTrack
from aiortc.rtcrtpparameters import RTCRtpCodecParameters
from aiortc.rtcrtpsender import RTCEncodedFrame

from server.encoding import BitratePolicy
from server.matte import Form
from server.repeats import RepeatingSender
from server.settings import MediaSettings

# Frames that wait for one viewer's sender: a third of a second of pictures, half a second of sound.
MAX_PICTURES = 8
MAX_SOUND = 25


@dataclass(frozen=True, slots=True)
class Encoded:
    """One frame as it goes to every viewer. ticks: 90 kHz for pictures, 48 kHz for sound."""

    payloads: list[bytes]
    ticks: int
    key_frame: bool = True
    audio_level: int = 0


class Subscription(MediaStreamTrack):
    """What waits for one viewer in one media section."""

    def __init__(self, kind: str, counters: Counter[str], on_stop: Callable[[Subscription], None]) -> None:
        super().__init__()
        self.kind = kind
        self._counters = counters
        self._on_stop = on_stop
        self._held: deque[Encoded] = deque()
        self._ready = asyncio.Event()

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

    def _hold(self, frame: Encoded) -> None:
        self._held.append(frame)
        self._ready.set()


class Sound(Subscription):
    """Sound for one viewer: the number held is bounded, the oldest is lost (`viewer_sound_dropped`)."""

    def __init__(self, counters: Counter[str], on_stop: Callable[[Subscription], None]) -> None:
        super().__init__("audio", counters, on_stop)

    def push(self, packet: Encoded) -> None:
        """Take a packet. Never waits."""
        if len(self._held) >= MAX_SOUND:
            self._held.popleft()
            self._counters["viewer_sound_dropped"] += 1
        self._hold(packet)


class Pictures(Subscription):
    """Pictures for one viewer: `push` never waits, the number held is bounded.

    A viewer begins with a key frame, and goes on from the next one after whatever it had to lose: because its pictures
    piled up (`viewer_frames_dropped`), because its network had no room (`viewer_network_behind`); what it skips until
    then is `viewer_frames_skipped`.
    """

    def __init__(
        self, settings: MediaSettings, counters: Counter[str], on_stop: Callable[[Subscription], None]
    ) -> None:
        super().__init__("video", counters, on_stop)
        self.policy = BitratePolicy(settings.start_bitrate, settings.min_bitrate, settings.max_bitrate)
        """What this viewer's network takes."""
        self.key_frame_at = -math.inf
        """When the last key frame was handed over, monotonic seconds."""
        self.ask_key_frame: Callable[[], None] = lambda: None
        """Of the lane that it is in."""
        self._last_ticks = -1
        self._awaits_key_frame = True

    def push(self, frame: Encoded, now: float) -> None:
        """Take a picture, if there is room and it can be decoded after what was sent."""
        if not self.policy.has_room(now):
            # Asked for once there is room: all pay for a key frame.
            self._counters["viewer_network_behind"] += 1
            self._awaits_key_frame = True
            return
        if frame.ticks <= self._last_ticks or (self._awaits_key_frame and not frame.key_frame):
            self._counters["viewer_frames_skipped"] += 1
            self.ask_key_frame()
            return
        if len(self._held) >= MAX_PICTURES:
            self._counters["viewer_frames_dropped"] += len(self._held) + 1
            self._held.clear()
            self._awaits_key_frame = True
            self.ask_key_frame()
            return
        self._awaits_key_frame, self._last_ticks = False, frame.ticks
        if frame.key_frame:
            self.key_frame_at = now
        self.policy.sent(8 * sum(map(len, frame.payloads)), now)
        self._hold(frame)

    def begin_anew(self) -> None:
        """Take nothing before a key frame: what comes next is of another encoder."""
        self._awaits_key_frame = True


class Source(Protocol):
    """A broadcast, as a viewer sees it."""

    counters: Counter[str]

    def watch(self, pictures: Pictures, codec: RTCRtpCodecParameters, form: Form) -> None:
        """Send pictures from now on."""
        ...

    def listen(self, sound: Sound) -> None:
        """Send sound from now on."""
        ...

    def unsubscribe(self, subscription: Subscription) -> None:
        """Send nothing more."""
        ...


class Feed:
    """The senders of one viewer. `stop` always."""

    def __init__(self, source: Source, settings: MediaSettings, form: Form = Form.PLAIN) -> None:
        self._source = source
        self._settings = settings
        self._form = form
        self._subscriptions: list[Subscription] = []

    def sender(self, kind: str, transport: RTCDtlsTransport) -> RTCRtpSender:
        """The sender of one media section; it takes part once the viewer is connected."""
        counters, leave = self._source.counters, self._source.unsubscribe
        if kind == "audio":
            sound = Sound(counters, leave)
            self._subscriptions.append(sound)
            return SoundSender(sound, transport, self._source)
        pictures = Pictures(self._settings, counters, leave)
        self._subscriptions.append(pictures)
        return PictureSender(pictures, transport, self._source, self._form)

    def stop(self) -> None:
        """Send nothing more."""
        for subscription in self._subscriptions:
            subscription.stop()


class PictureSender(RepeatingSender):
    """Sends the pictures that were encoded for all."""

    def __init__(self, pictures: Pictures, transport: RTCDtlsTransport, source: Source, form: Form) -> None:
        super().__init__(pictures, transport, source.counters, pictures.policy)
        self._pictures = pictures
        self._source = source
        self._form = form
        self._subscribed = False
        self._key_frame_asked = False

    async def _next_encoded_frame(self, codec: RTCRtpCodecParameters) -> RTCEncodedFrame | None:
        """Called by the stock loop, from the connection on, and again when every packet has left."""
        if self._subscribed:
            await self.send_again_if_many_are_lost()
        else:
            self._subscribed = True
            self._source.watch(self._pictures, codec, self._form)
        frame = await self._pictures.next()
        if not self._enabled:
            return None
        if frame.key_frame and self._key_frame_asked:
            self._key_frame_asked = False
            self.forget_sent()
        self._source.counters["video_frames_sent"] += 1
        return RTCEncodedFrame(frame.payloads, frame.ticks & 0xFFFFFFFF, 0)

    def _send_keyframe(self) -> None:
        # Who asks again within a round trip cannot have seen the last one.
        if time.monotonic() - self._pictures.key_frame_at >= self.round_trip.latest_s:
            self._key_frame_asked = True
            self._pictures.ask_key_frame()


class SoundSender(RTCRtpSender):
    """Sends the sound that was encoded for all."""

    def __init__(self, sound: Sound, transport: RTCDtlsTransport, source: Source) -> None:
        super().__init__(sound, transport)
        self._sound = sound
        self._source = source
        self._subscribed = False

    async def _next_encoded_frame(self, codec: RTCRtpCodecParameters) -> RTCEncodedFrame | None:
        """Called by the stock loop, from the connection on."""
        if not self._subscribed:
            self._subscribed = True
            self._source.listen(self._sound)
        packet = await self._sound.next()
        if not self._enabled:
            return None
        self._source.counters["audio_frames_sent"] += 1
        return RTCEncodedFrame(packet.payloads, packet.ticks & 0xFFFFFFFF, packet.audio_level)
