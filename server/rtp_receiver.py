"""The receiving half of one media section: RTP in, decoded frames with their arrival times out.

Takes the place of aiortc's RTCRtpReceiver, whose buffers have no clock and whose queues no end (see reassembly.py).
It is a class of its own instead of a patched one: RTCPeerConnection and the DTLS transport only use the methods
marked "aiortc" below, so nothing private of the stock class is touched. Decoding runs in the peer's own pool, one
frame at a time; there is no thread to join when the peer leaves.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Executor

import av
from aiortc import RTCDtlsTransport, clock
from aiortc.codecs import depayload, is_rtx
from aiortc.mediastreams import MediaStreamTrack
from aiortc.rate import RemoteBitrateEstimator
from aiortc.rtcrtpparameters import RTCRtpCodecParameters, RTCRtpReceiveParameters
from aiortc.rtcrtpreceiver import StreamStatistics
from aiortc.rtp import (
    RTCP_PSFB_APP,
    RTCP_PSFB_PLI,
    RTCP_RTPFB_NACK,
    AnyRtcpPacket,
    RtcpPsfbPacket,
    RtcpReceiverInfo,
    RtcpRrPacket,
    RtcpRtpfbPacket,
    RtcpSrPacket,
    RtpPacket,
    pack_remb_fci,
    unwrap_rtx,
)
from aiortc.stats import RTCStatsReport

from server.decoding import Decoder, Picture, PictureTooLargeError
from server.reassembly import (
    EncodedFrame,
    FrameOrder,
    PacketOrder,
    RtpPiece,
    is_h264_key_frame,
    is_vp8_key_frame,
)
from server.settings import MediaSettings

TICK_S = 0.008
SOURCE_SILENT_S = 1.0
MAX_DECODE_ERRORS = 20
# An estimate is told this often; at once when it is less than this share of the one told. One a packet, as the
# estimator makes them on a full network, would fill the way back.
TELL_INTERVAL_S = 0.2
TOLD_AT_ONCE = 0.97
# Video: a hole of 150 ms releases five frames at once at 30 fps; the rest is for a decoder that was held up.
MAX_QUEUED = {"video": 12, "audio": 50}


class MediaReceiver:
    """One receiver of a peer connection. `deliver` is called on the loop with every decoded frame, in order."""

    def __init__(
        self,
        kind: str,
        transport: RTCDtlsTransport,
        pool: Executor,
        settings: MediaSettings,
        counters: Counter[str],
        deliver: Callable[[Picture, float], None],
        ended: Callable[[], None],
    ) -> None:
        self._enabled = True  # aiortc: set by the transceiver
        self._track: MediaStreamTrack | None = None  # aiortc: set by the peer connection, not used here
        self._kind = kind
        self._transport = transport
        self._pool = pool
        self._settings = settings
        self._counters = counters
        self._deliver = deliver
        self._ended = ended
        self._codecs: dict[int, RTCRtpCodecParameters] = {}
        self._rtx_sources: dict[int, int] = {}
        self._order: FrameOrder | PacketOrder | None = None
        self._codec: RTCRtpCodecParameters | None = None
        self._source: int | None = None
        self._source_at = 0.0
        self._rtcp_source: int | None = None
        self._streams: dict[int, StreamStatistics] = {}
        self._sender_reports: dict[int, tuple[int, float]] = {}
        self._estimator = RemoteBitrateEstimator() if kind == "video" else None
        self._newest_sent_at: int | None = None  # abs-send-time: 24 bits
        self._told_bitrate, self._told_at, self._reported_at = 0, -math.inf, -math.inf
        self._queue: deque[tuple[RTCRtpCodecParameters, EncodedFrame]] = deque()
        self._queued = asyncio.Event()
        self._trouble = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def track(self) -> MediaStreamTrack | None:
        """aiortc: the track that the peer connection made; nothing is ever put into it."""
        return self._track

    @property
    def transport(self) -> RTCDtlsTransport:
        """aiortc: the transport that RTP comes over."""
        return self._transport

    def setTransport(self, transport: RTCDtlsTransport) -> None:  # noqa: N802
        """aiortc: change the transport when sections are bundled."""
        self._transport = transport

    def _set_rtcp_ssrc(self, ssrc: int) -> None:
        self._rtcp_source = ssrc

    async def getStats(self) -> RTCStatsReport:  # noqa: N802
        """aiortc: statistics; ours are the counters."""
        return RTCStatsReport()

    async def receive(self, parameters: RTCRtpReceiveParameters) -> None:
        """aiortc: begin, once the transport is connected; called again for nothing."""
        if self._tasks:
            return
        self._codecs = {codec.payloadType: codec for codec in parameters.codecs if codec.payloadType is not None}
        self._rtx_sources = {item.rtx.ssrc: item.ssrc for item in parameters.encodings if item.rtx}
        if self._estimator is not None:
            # Unseeded, the estimate starts from what happens to arrive and rises 8 % a second: a 720p camera came
            # as 480x270 for 14 s.
            self._estimator.rate_control.set_estimate(self._settings.start_bitrate, clock.current_ms())
        self._transport._register_rtp_receiver(self, parameters)
        self._tasks = [
            asyncio.create_task(self._decode(), name=f"{self._kind}/decode"),
            asyncio.create_task(self._repair(), name=f"{self._kind}/repair"),
            asyncio.create_task(self._report(), name=f"{self._kind}/rtcp"),
        ]

    async def stop(self) -> None:
        """aiortc: end for good. A decode that runs ends in the pool and its result is dropped."""
        self._transport._unregister_rtp_receiver(self)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._ended()

    def _handle_disconnect(self) -> None:
        self._ended()

    async def _handle_rtcp_packet(self, packet: AnyRtcpPacket) -> None:
        # BYE is ignored: Chromium also sends it when a camera is only paused.
        if isinstance(packet, RtcpSrPacket):
            short_ntp = (packet.sender_info.ntp_timestamp >> 16) & 0xFFFFFFFF
            self._sender_reports[packet.ssrc] = (short_ntp, time.monotonic())

    async def _handle_rtp_packet(self, packet: RtpPacket, arrival_time_ms: int) -> None:
        codec = self._codecs.get(packet.payload_type)
        if not self._enabled or codec is None:
            return
        now = time.monotonic()
        await self._estimate(packet, arrival_time_ms)
        if packet.ssrc not in self._streams and len(self._streams) < 4:
            self._streams[packet.ssrc] = StreamStatistics(codec.clockRate)
        if (stream := self._streams.get(packet.ssrc)) is not None:
            stream.add(packet)
        original = self._unwrapped(packet, codec)
        if original is None or not self._is_current_source(original.ssrc, now):
            return
        codec = self._codecs[original.payload_type]
        try:
            data = depayload(codec, original.payload) if original.payload else b""
        except ValueError:
            self._counters["packets_malformed"] += 1
            return
        order = self._order_for(codec)
        order.push(original.sequence_number, RtpPiece(original.timestamp, bool(original.marker), data, now))
        self._release(order, now)

    async def _estimate(self, packet: RtpPacket, arrival_time_ms: int) -> None:
        """Feed the bandwidth estimate, and tell the sender of it (REMB), with a report where it fell."""
        sent_at = packet.extensions.abs_send_time
        if self._estimator is None or sent_at is None:
            return
        size = len(packet.payload) + packet.padding_size
        if self._newest_sent_at is not None and (sent_at - self._newest_sent_at) & 0x800000:
            # Overtaken, or repeated under the time of its original, as aiortc does: no measure of the way's delay.
            self._estimator.incoming_bitrate.add(size, arrival_time_ms)
            return
        self._newest_sent_at = sent_at
        estimate = self._estimator.add(
            abs_send_time=sent_at, arrival_time_ms=arrival_time_ms, payload_size=size, ssrc=packet.ssrc
        )
        if estimate is None or self._rtcp_source is None:
            return
        bitrate = min(max(estimate[0], self._settings.min_bitrate), self._settings.max_bitrate)
        has_fallen, now = bitrate < TOLD_AT_ONCE * self._told_bitrate, time.monotonic()
        if not has_fallen and now - self._told_at < TELL_INTERVAL_S:
            return
        if has_fallen and now - self._reported_at >= TELL_INTERVAL_S:
            await self._send_reports()
        self._told_bitrate, self._told_at = bitrate, now
        fci = pack_remb_fci(bitrate, estimate[1])
        await self._send_rtcp(RtcpPsfbPacket(fmt=RTCP_PSFB_APP, ssrc=self._rtcp_source, media_ssrc=0, fci=fci))

    def _unwrapped(self, packet: RtpPacket, codec: RTCRtpCodecParameters) -> RtpPacket | None:
        """Return the packet, out of its retransmission wrapping if it has one; None where there is nothing inside."""
        if not is_rtx(codec):
            return packet
        # FFmpeg names the source of its repetitions in a group alone, where aiortc does not look. One stream is
        # decoded, so they can only be that one's.
        source = self._rtx_sources.get(packet.ssrc) if self._rtx_sources else self._source
        payload_type = codec.parameters.get("apt")
        if source is None or not isinstance(payload_type, int) or payload_type not in self._codecs:
            return None
        if len(packet.payload) < 2:  # Chromium probes the bandwidth with empty ones
            return None
        return unwrap_rtx(packet, payload_type=payload_type, ssrc=source)

    def _is_current_source(self, ssrc: int, now: float) -> bool:
        """Whether a packet belongs to the one stream that is decoded; another may follow after it fell silent."""
        if ssrc != self._source:
            if self._source is not None and now - self._source_at < SOURCE_SILENT_S:
                self._counters["foreign_source"] += 1
                return False
            self._source, self._order = ssrc, None
        self._source_at = now
        return True

    def _order_for(self, codec: RTCRtpCodecParameters) -> FrameOrder | PacketOrder:
        if self._order is None or codec is not self._codec:
            self._codec = codec
            if self._kind == "audio":
                self._order = PacketOrder(self._counters)
            else:
                test = is_vp8_key_frame if codec.name.lower() == "vp8" else is_h264_key_frame
                self._order = FrameOrder(test, self._settings.hole_deadline_s, self._counters)
        return self._order

    def _release(self, order: FrameOrder | PacketOrder, now: float) -> None:
        for frame in order.take(now):
            if len(self._queue) >= MAX_QUEUED[self._kind]:
                # The decoder is behind: what waits would be shown late and is dropped, up to the next key frame.
                self._counters[f"{self._kind}_decode_dropped"] += len(self._queue)
                self._queue.clear()
                order.await_key_frame(now)
                if self._kind == "video":
                    continue
            assert self._codec is not None
            self._queue.append((self._codec, frame))
            self._queued.set()
        if order.troubled:
            self._trouble.set()

    async def _repair(self) -> None:
        """While something is missing: ask again, give up in time, ask for a key frame."""
        while True:
            await self._trouble.wait()
            self._trouble.clear()
            while (order := self._order) is not None and order.troubled:
                now = time.monotonic()
                self._release(order, now)
                await self._ask(order, now)
                await asyncio.sleep(TICK_S)

    async def _ask(self, order: FrameOrder | PacketOrder, now: float) -> None:
        if self._rtcp_source is None or self._source is None:
            return
        questions: list[AnyRtcpPacket] = []
        if lost := order.due(now):
            nack = RtcpRtpfbPacket(fmt=RTCP_RTPFB_NACK, ssrc=self._rtcp_source, media_ssrc=self._source)
            nack.lost = sorted(lost)
            questions.append(nack)
        if order.key_frame_due(now):
            questions.append(RtcpPsfbPacket(fmt=RTCP_PSFB_PLI, ssrc=self._rtcp_source, media_ssrc=self._source))
        for question in questions * (2 if order.asks_twice else 1):
            await self._send_rtcp(question)

    async def _decode(self) -> None:
        """Decode what is queued, one frame at a time, in the pool."""
        loop = asyncio.get_running_loop()
        decoder: Decoder | None = None
        errors = 0  # in a row: a key frame is asked for after each
        while True:
            while not self._queue:
                self._queued.clear()
                await self._queued.wait()
            codec, frame = self._queue.popleft()
            if decoder is None or decoder.codec is not codec:
                decoder = Decoder(codec, self._settings.max_input_pixels)
            try:
                pictures = await loop.run_in_executor(self._pool, decoder.decode, frame)
            except PictureTooLargeError:
                self._give_up("input_too_large")
                return
            except av.FFmpegError:
                self._counters[f"{self._kind}_decode_errors"] += 1
                errors += 1
                if errors > MAX_DECODE_ERRORS:
                    self._give_up("input_undecodable")
                    return
                if self._order is not None:
                    self._order.await_key_frame(time.monotonic())
                    self._trouble.set()
                continue
            errors = 0
            for picture in pictures:
                self._deliver(picture, frame.arrived_at)

    def _give_up(self, reason: str) -> None:
        """End this input, the connection stays."""
        self._counters[reason] += 1
        self._enabled = False
        self._ended()

    async def _report(self) -> None:
        """Send receiver reports, as aiortc does: at random intervals of 0.5 to 1.5 s (RFC 3550, 6.2)."""
        while True:
            await asyncio.sleep(0.5 + random.random())
            await self._send_reports()

    async def _send_reports(self) -> None:
        self._reported_at = time.monotonic()
        if self._rtcp_source is not None and self._streams:
            reports = [self._receiver_info(ssrc, stream) for ssrc, stream in self._streams.items()]
            await self._send_rtcp(RtcpRrPacket(ssrc=self._rtcp_source, reports=reports))

    def _receiver_info(self, ssrc: int, stream: StreamStatistics) -> RtcpReceiverInfo:
        last_report, received_at = self._sender_reports.get(ssrc, (0, 0.0))
        delay = time.monotonic() - received_at if last_report else 0.0
        return RtcpReceiverInfo(
            ssrc=ssrc,
            fraction_lost=stream.fraction_lost,
            packets_lost=stream.packets_lost,
            highest_sequence=stream.max_seq or 0,
            jitter=stream.jitter,
            lsr=last_report,
            dlsr=int(min(delay, 65535.0) * 65536),
        )

    async def _send_rtcp(self, packet: AnyRtcpPacket) -> None:
        try:
            await self._transport._send_rtp(bytes(packet))
        except ConnectionError:
            self._counters["rtcp_unsent"] += 1
