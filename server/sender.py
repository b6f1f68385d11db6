"""The sending half of a media section: aiortc's sender with our encoders, in our pool, under our bitrate policy.

Three methods of RTCRtpSender are overridden and one private figure is read (`_wire_timestamp`); packets and reports are
stock, repeats are in repeats.py. tests/server/test_sender.py fails when an upgrade moves them.
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
from aiortc.rtp import (
    RTCP_PSFB_APP,
    AnyRtcpPacket,
    RtcpPsfbPacket,
    RtcpRrPacket,
    RtcpSrPacket,
    unpack_remb_fci,
)

from server.egress import DelayedAudio, OutgoingVideo, ReleasedFrame
from server.encoding import AudioEncoder, BitratePolicy, VideoEncoder
from server.frames import FrameMark
from server.repeats import RepeatingSender
from server.settings import MediaSettings

MAX_MARKS = 256
KEY_FRAME_INTERVAL_S = 0.3
# The encoder is shown no longer gap than this, in 90 kHz.
MAX_STEP_TICKS = 18000


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
        super().__init__(track, transport, counters)
        self.marks: deque[FrameMark] = deque(maxlen=MAX_MARKS)
        self._pictures = track
        self._pool = pool
        self._counters = counters
        self._policy = BitratePolicy(settings.start_bitrate, settings.min_bitrate, settings.max_bitrate)
        self._video_encoder: VideoEncoder | None = None
        self._last_ticks = self._encoder_ticks = 0
        self._key_frame_asked = False
        self._key_frame_at = 0.0
        self._on_the_wire: ReleasedFrame | None = None

    async def _next_encoded_frame(self, codec: RTCRtpCodecParameters) -> RTCEncodedFrame | None:
        """Called by the stock loop, which sends what is returned and comes back when every packet has left."""
        await self._note_sent()
        released = await self._pictures.next()
        if not self._enabled:
            return None
        now = time.monotonic()
        step, self._last_ticks = released.ticks - self._last_ticks, released.ticks
        if not self._policy.has_room(now):
            self._counters["network_behind"] += 1
            self._pictures.unsent.append((released.frame.index, "network_behind"))
            return None
        # Left-out pictures take no time for the encoder: it would spend what they saved on the next one, which came out
        # five times as long, and on a narrow network more had to be left out for it, and so on.
        self._encoder_ticks += min(max(step, 1), MAX_STEP_TICKS)
        if self._video_encoder is None:
            self._video_encoder = VideoEncoder(codec)
        # Who asks again within a round trip cannot have seen the last one.
        interval_s = max(KEY_FRAME_INTERVAL_S, self.round_trip.latest_s)
        key_frame = self._key_frame_asked and now - self._key_frame_at >= interval_s
        if key_frame:
            self._key_frame_asked, self._key_frame_at = False, now
            self._counters["key_frames_sent"] += 1
            self.forget_sent()
        payloads = await asyncio.get_running_loop().run_in_executor(
            self._pool,
            self._video_encoder.encode,
            released.frame.rgb,
            self._encoder_ticks,
            self._policy.bitrate(now),
            key_frame,
        )
        if not payloads:
            self._counters["encoder_skipped"] += 1
            self._pictures.unsent.append((released.frame.index, "encoder_skipped"))
            return None
        self._policy.sent(8 * sum(map(len, payloads)), now)
        self._counters["frames_sent"] += 1
        self._on_the_wire = released
        return RTCEncodedFrame(payloads, released.ticks & 0xFFFFFFFF, 0)

    async def _handle_rtcp_packet(self, packet: AnyRtcpPacket) -> None:
        if isinstance(packet, RtcpPsfbPacket) and packet.fmt == RTCP_PSFB_APP:
            try:
                bitrate, sources = unpack_remb_fci(packet.fci)
            except ValueError:
                self._counters["rtcp_malformed"] += 1
                return
            if self._ssrc in sources:
                self._policy.report(bitrate, time.monotonic())
            return
        await super()._handle_rtcp_packet(packet)
        if isinstance(packet, RtcpRrPacket | RtcpSrPacket):
            for report in packet.reports:
                if report.ssrc == self._ssrc:
                    self._policy.lost(report.fraction_lost / 256, self.round_trip.queue_s, time.monotonic())

    def has_room_to_repeat(self, bits: int, now: float) -> bool:
        """See RepeatingSender."""
        if not self._policy.has_room(now):
            return False
        self._policy.sent(bits, now)
        return True

    def _send_keyframe(self) -> None:
        self._key_frame_asked = True

    async def _note_sent(self) -> None:
        if (released := self._on_the_wire) is not None:
            frame, timestamp = released.frame, self._wire_timestamp()
            self.marks.append(FrameMark(timestamp, frame.index, frame.arrived_at, released.released_at, frame.kind))
            self._on_the_wire = None
            if self._policy.sends_twice:
                for sequence_number in self.last_frame(timestamp):
                    await self._retransmit(sequence_number)

    def _wire_timestamp(self) -> int:
        """RTP timestamp of the last packet sent.

        Private, because the sending loop adds a random origin that it keeps in a local variable; this field, made
        for its sender reports, is the only place where the sum is kept.
        """
        timestamp: int = self._RTCRtpSender__rtp_timestamp  # type: ignore[attr-defined]
        return timestamp


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
