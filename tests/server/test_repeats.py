"""What is sent again, and what is not. The wire is a list; the history and the RTX format are aiortc's own."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import pytest
from aiortc import clock
from aiortc.codecs import CODECS
from aiortc.rtcrtpparameters import (
    RTCRtcpParameters,
    RTCRtpCodecParameters,
    RTCRtpHeaderExtensionParameters,
    RTCRtpSendParameters,
)
from aiortc.rtp import (
    RTCP_RTPFB_NACK,
    HeaderExtensionsMap,
    RtcpPacket,
    RtcpReceiverInfo,
    RtcpRrPacket,
    RtcpRtpfbPacket,
    RtcpSrPacket,
    RtpPacket,
    is_rtcp,
)

from server.egress import OutgoingVideo
from server.frames import OutgoingFrame
from server.repeats import MAX_ROUND_TRIP_S, RoundTrip
from server.sender import VideoSender
from server.settings import MediaSettings

VP8 = next(codec for codec in CODECS["video"] if codec.name == "VP8")
RTX = RTCRtpCodecParameters("video/rtx", 90000, payloadType=98, parameters={"apt": VP8.payloadType})
SEND_TIME = RTCRtpHeaderExtensionParameters(id=2, uri="http://www.webrtc.org/experiments/rtp-hdrext/abs-send-time")


class Wire:
    """The transport of a sender: keeps what is sent, parsed."""

    state = "connected"
    _stats_id = "wire"

    def __init__(self) -> None:
        self.packets: list[RtpPacket] = []
        self.reports: list[RtcpSrPacket] = []
        self._extensions = HeaderExtensionsMap()

    def _register_rtp_sender(self, sender: Any, parameters: RTCRtpSendParameters) -> None:
        self._extensions.configure(parameters)

    def _unregister_rtp_sender(self, sender: Any) -> None:
        """Nothing is routed."""

    async def _send_rtp(self, data: bytes) -> None:
        if is_rtcp(data):
            self.reports += [packet for packet in RtcpPacket.parse(data) if isinstance(packet, RtcpSrPacket)]
        else:
            self.packets.append(RtpPacket.parse(data, self._extensions))

    def of(self, payload_type: int) -> list[RtpPacket]:
        return [packet for packet in self.packets if packet.payload_type == payload_type]


class Sending:
    """A sender that runs, with one frame sent. Use as a context manager."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.wire = Wire()
        self._pool = ThreadPoolExecutor(1)
        self.track = OutgoingVideo(self.counters)
        self.sender = VideoSender(self.track, cast(Any, self.wire), self._pool, MediaSettings(), self.counters)
        self._noise = np.random.default_rng(0)
        self._frames = 0

    async def __aenter__(self) -> Sending:
        await self.sender.send(
            RTCRtpSendParameters(
                codecs=[VP8, RTX], headerExtensions=[SEND_TIME], muxId="0", rtcp=RTCRtcpParameters(cname="test")
            )
        )
        await self.frame()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.sender.stop()
        self._pool.shutdown()

    async def frame(self) -> list[RtpPacket]:
        """Send one more frame; its packets, more than one."""
        before = len(self.of_frames)
        picture = self._noise.integers(0, 255, (240, 320, 3), np.uint8)
        self.track.push(OutgoingFrame(self._frames, 0.0, picture, 0), 100.0 + self._frames / 15)
        self._frames += 1
        async with asyncio.timeout(30):
            while len(self.of_frames) == before or not self.of_frames[-1].marker:
                await asyncio.sleep(0.005)
        assert len(self.of_frames) > before + 1
        return self.of_frames[before:]

    @property
    def of_frames(self) -> list[RtpPacket]:
        return self.wire.of(VP8.payloadType or 0)

    @property
    def repeats(self) -> list[int]:
        """Sequence numbers of the originals, as RTX has them in front (RFC 4588, 4)."""
        return [int.from_bytes(packet.payload[:2], "big") for packet in self.wire.of(98)]

    async def ask(self, *lost: int) -> None:
        nack = RtcpRtpfbPacket(fmt=RTCP_RTPFB_NACK, ssrc=1, media_ssrc=self.sender._ssrc)
        nack.lost = list(lost)
        await self.sender._handle_rtcp_packet(nack)


def test_round_trip_takes_what_can_be_one_and_tells_the_queue() -> None:
    trip = RoundTrip()
    assert trip.queue_s == 0.0
    for seconds in (0.05, -1.0, 0.04, MAX_ROUND_TRIP_S, 0.34):
        trip.add(seconds)
    assert trip.latest_s == 0.34 and trip.queue_s == pytest.approx(0.3)


async def test_a_repeat_tells_its_own_time_of_sending() -> None:
    async with Sending() as sending:
        original = sending.of_frames[0]
        await asyncio.sleep(0.05)
        await sending.ask(original.sequence_number)
        assert sending.repeats == [original.sequence_number]
        (repeat,) = sending.wire.of(98)
        later = (repeat.extensions.abs_send_time or 0) - (original.extensions.abs_send_time or 0)
        assert later & 0xFFFFFF >= 0.05 * (1 << 18)  # 6.18 fixed point
        assert (clock.current_ntp_time() >> 14) - (repeat.extensions.abs_send_time or 0) & 0xFFFFFF < 30 << 18


async def test_a_packet_is_repeated_once_a_round_trip_and_what_is_gone_is_counted() -> None:
    async with Sending() as sending:
        first, second = (packet.sequence_number for packet in sending.of_frames[:2])
        sending.sender.round_trip.add(9.0)
        for _ in range(5):
            await sending.ask(first, second, first + 64)
        assert sending.repeats == [first, second]
        assert (sending.counters["packets_repeated"], sending.counters["repeats_spared"]) == (2, 8)
        assert sending.counters["repeats_gone"] == 5
        sending.sender.round_trip.add(1e-6)
        await sending.ask(first)
        assert sending.repeats == [first, second, first]


async def test_nothing_older_than_a_key_frame_that_was_asked_for_is_repeated() -> None:
    async with Sending() as sending:
        old = sending.of_frames[0].sequence_number
        sending.sender._send_keyframe()
        new = (await sending.frame())[0].sequence_number
        await sending.ask(old, new)
        assert sending.repeats == [new] and sending.counters["repeats_gone"] == 1


async def test_repeats_are_left_out_on_a_tight_network() -> None:
    async with Sending() as sending:
        policy, now = sending.sender.policy, time.monotonic()
        policy.sent(1_000_000, now)
        now += 1.5
        policy.sent(0, now)
        policy.report(1_500_000, now)
        policy.report(150_000, now)
        policy.sent(10_000_000, now)
        await sending.ask(sending.of_frames[0].sequence_number)
        assert sending.repeats == [] and sending.counters["repeats_left_out"] == 1


async def test_every_packet_goes_twice_while_many_are_lost_by_chance() -> None:
    async with Sending() as sending:
        for second in range(4):
            sending.sender.policy.lost(0.2, 0.0, float(second))
        sent = [packet.sequence_number for packet in await sending.frame()]
        await sending.frame()  # its turn comes once the frame before has left
        assert sending.repeats[-len(sent) :] == sent or sending.repeats[: len(sent)] == sent


async def test_a_receiver_report_measures_the_round_trip() -> None:
    async with Sending() as sending:
        async with asyncio.timeout(30):
            while not sending.wire.reports:
                await asyncio.sleep(0.01)
        report = sending.wire.reports[-1]
        lsr = report.sender_info.ntp_timestamp >> 16 & 0xFFFFFFFF
        info = RtcpReceiverInfo(sending.sender._ssrc, 0, 0, 0, 0, lsr, 1)
        assert sending.sender.round_trip.queue_s == 0.0
        before = sending.sender.round_trip.latest_s
        await asyncio.sleep(0.06)
        await sending.sender._handle_rtcp_packet(RtcpRrPacket(ssrc=1, reports=[info]))
        assert sending.sender.round_trip.latest_s >= 0.06 != before
