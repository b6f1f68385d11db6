"""The sending half of a media section: aiortc's sender with our encoders, in our pool, under our bitrate policy.

Two methods of RTCRtpSender are overridden; packets and reports are stock, repeats and what the receiver says it can
take are in repeats.py. tests/server/test_sender.py fails when an upgrade moves them.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from concurrent.futures import Executor

import av
from aiortc import RTCDtlsTransport, RTCRtpSender
from aiortc.rtcrtpparameters import RTCRtpCodecParameters
from aiortc.rtcrtpsender import RTCEncodedFrame

from server.egress import DelayedAudio, OutgoingVideo, ReleasedFrame
from server.encoding import AudioEncoder, BitratePolicy
from server.frames import FrameMark
from server.live_encoder import KEY_FRAME_INTERVAL_S, LiveEncoder
from server.repeats import RepeatingSender
from server.settings import MediaSettings

MAX_MARKS = 256


class VideoSender(RepeatingSender):
    """Encodes and sends the outgoing pictures, and notes under which RTP timestamp each one left."""

    def __init__(
        self,
        track: OutgoingVideo,
        transport: RTCDtlsTransport,
        pool: Executor,
        settings: MediaSettings,
        counters: Counter[str],
    ) -> None:
        policy = BitratePolicy(settings.start_bitrate, settings.min_bitrate, settings.max_bitrate)
        super().__init__(track, transport, counters, policy)
        self.marks: deque[FrameMark] = deque(maxlen=MAX_MARKS)
        self._pictures = track
        self._counters = counters
        self._encoder = LiveEncoder(pool)
        self._on_the_wire: ReleasedFrame | None = None

    async def _next_encoded_frame(self, codec: RTCRtpCodecParameters) -> RTCEncodedFrame | None:
        """Called by the stock loop, which sends what is returned and comes back when every packet has left."""
        await self._note_sent()
        released = await self._pictures.next()
        if not self._enabled:
            return None
        now = time.monotonic()
        if not self.policy.has_room(now):
            self._counters["network_behind"] += 1
            self._pictures.unsent.append((released.frame.index, "network_behind"))
            self._encoder.leave_out(released)
            return None
        # Who asks again within a round trip cannot have seen the last one.
        interval_s = max(KEY_FRAME_INTERVAL_S, self.round_trip.latest_s)
        payloads = await self._encoder.encode(codec, released, self.policy.bitrate(now), now, interval_s)
        if self._encoder.made_key_frame:
            self._counters["key_frames_sent"] += 1
            self.forget_sent()
        if not payloads:
            self._counters["encoder_skipped"] += 1
            self._pictures.unsent.append((released.frame.index, "encoder_skipped"))
            return None
        self.policy.sent(8 * sum(map(len, payloads)), now)
        self._counters["frames_sent"] += 1
        self._on_the_wire = released
        return RTCEncodedFrame(payloads, released.ticks & 0xFFFFFFFF, 0)

    def _send_keyframe(self) -> None:
        self._encoder.ask_key_frame()

    async def _note_sent(self) -> None:
        if (released := self._on_the_wire) is not None:
            frame, timestamp = released.frame, self.wire_timestamp
            self.marks.append(FrameMark(timestamp, frame.index, frame.arrived_at, released.released_at, frame.kind))
            self._on_the_wire = None
            await self.send_again_if_many_are_lost()


class AudioSender(RTCRtpSender):
    """Encodes and sends the delayed sound."""

    def __init__(self, track: DelayedAudio, transport: RTCDtlsTransport, pool: Executor) -> None:
        super().__init__(track, transport)
        self._sound = track
        self._pool = pool
        self._audio_encoder = AudioEncoder()
        self._encoded: deque[tuple[int, bytes, int]] = deque()

    async def _next_encoded_frame(self, codec: RTCRtpCodecParameters) -> RTCEncodedFrame | None:
        """Called by the stock loop. One packet at a time: it gives all payloads of a frame the same timestamp."""
        if not self._encoded:
            frame: av.AudioFrame = await self._sound.recv()
            if not self._enabled:
                return None
            loop = asyncio.get_running_loop()
            self._encoded.extend(await loop.run_in_executor(self._pool, self._audio_encoder.encode, frame))
        if not self._encoded:
            return None
        timestamp, payload, level = self._encoded.popleft()
        return RTCEncodedFrame([payload], timestamp & 0xFFFFFFFF, level)
