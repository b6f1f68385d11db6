"""The receiver against a recorded wire: what it asks for, what it decodes, what it drops."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import av
import numpy as np
import pytest
from aiortc.codecs import CODECS
from aiortc.rtcrtpparameters import RTCRtpDecodingParameters, RTCRtpReceiveParameters, RTCRtpRtxParameters
from aiortc.rtp import RtcpPacket, RtcpPsfbPacket, RtcpRrPacket, RtcpRtpfbPacket, RtpPacket, unpack_remb_fci, wrap_rtx

from server.decoding import Picture
from server.encoding import VideoEncoder
from server.rtp_receiver import MAX_DECODE_ERRORS, MAX_QUEUED, MediaReceiver
from server.settings import MediaSettings

PATIENCE_S = 30.0
SSRC, RTX_SSRC = 1000, 2000
VP8, RTX = CODECS["video"][0], CODECS["video"][1]


class Wire:
    """The transport of a receiver: it keeps the RTCP that the receiver sends."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    async def _send_rtp(self, data: bytes) -> None:
        self.sent += RtcpPacket.parse(data)

    def _register_rtp_receiver(self, receiver: object, parameters: object) -> None:
        pass

    def _unregister_rtp_receiver(self, receiver: object) -> None:
        pass

    def of(self, kind: type[RtcpPsfbPacket | RtcpRtpfbPacket], fmt: int) -> list[Any]:
        return [packet for packet in self.sent if isinstance(packet, kind) and packet.fmt == fmt]


class GatedPool(ThreadPoolExecutor):
    """One worker that only starts when told: a decoder that is behind."""

    def __init__(self) -> None:
        super().__init__(1)
        self.gate = threading.Event()
        self.gate.set()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def gated() -> Any:
            self.gate.wait(PATIENCE_S)
            return fn(*args, **kwargs)

        return super().submit(gated)


class Bench:
    """A receiver of VP8 with everything around it."""

    def __init__(self, settings: MediaSettings) -> None:
        self.counters: Counter[str] = Counter()
        self.wire = Wire()
        self.pool = GatedPool()
        self.pictures: list[int | None] = []
        self.ended = asyncio.Event()
        self.receiver = MediaReceiver(
            "video", cast(Any, self.wire), self.pool, settings, self.counters, self._deliver, self.ended.set
        )
        self.receiver._set_rtcp_ssrc(1)
        self._encoder = VideoEncoder(VP8)
        self._sequence = 65530

    def _deliver(self, picture: Picture, arrived_at: float) -> None:
        assert isinstance(picture, av.VideoFrame)
        self.pictures.append(picture.pts)

    def frame(self, number: int, *, key: bool = False) -> list[RtpPacket]:
        """The packets of one frame of noise."""
        noise = np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)
        payloads = self._encoder.encode(noise, number * 3000, 3_000_000, key)
        packets = []
        for place, payload in enumerate(payloads):
            marker = int(place == len(payloads) - 1)
            packet = RtpPacket(97, marker, self._sequence & 0xFFFF, number * 3000, SSRC, payload)
            packet.extensions.abs_send_time = number * 8000
            self._sequence += 1
            packets.append(packet)
        return packets

    async def receive(self, *packets: RtpPacket) -> None:
        for packet in packets:
            await self.receiver._handle_rtp_packet(packet, arrival_time_ms=packet.timestamp // 90)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.005)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench(MediaSettings())
    encoding = RTCRtpDecodingParameters(ssrc=SSRC, payloadType=97, rtx=RTCRtpRtxParameters(ssrc=RTX_SSRC))
    await made.receiver.receive(RTCRtpReceiveParameters(codecs=[VP8, RTX], encodings=[encoding]))
    yield made
    made.pool.gate.set()
    await made.receiver.stop()
    made.pool.shutdown()


async def test_first_report_is_the_seeded_estimate(bench: Bench) -> None:
    await bench.receive(*bench.frame(0))
    (remb,) = bench.wire.of(RtcpPsfbPacket, 15)
    bitrate, sources = unpack_remb_fci(remb.fci)
    assert abs(bitrate - 1_500_000) < 50_000 and sources == [SSRC]


async def test_repeats_under_the_time_of_their_originals_do_not_lower_the_estimate(bench: Bench) -> None:
    """As aiortc sends them. One packet in ten is lost and repeated 48 ms after the next one came."""
    chance = random.Random(0)
    arrivals: list[tuple[float, float]] = []
    lost_ms: list[float] = []
    for number in range(300):
        for place in range(chance.randint(3, 7)):
            sent_ms = 1000 + number * 1000 / 15 + place / 10
            if chance.random() < 0.1 and number > 60:
                lost_ms.append(sent_ms)
                continue
            arrivals += [(sent_ms + 20, sent_ms), *((sent_ms + 68, before_ms) for before_ms in lost_ms)]
            lost_ms = []
    for arrived_ms, sent_ms in sorted(arrivals):
        packet = RtpPacket(97, 0, 0, 0, SSRC, bytes(1200))
        packet.extensions.abs_send_time = int(sent_ms * 262144 / 1000) & 0xFFFFFF
        await bench.receiver._estimate(packet, int(arrived_ms))
    told = [unpack_remb_fci(remb.fci)[0] for remb in bench.wire.of(RtcpPsfbPacket, 15)]
    assert min(told) >= 0.97 * told[0]


async def test_a_fallen_estimate_is_told_at_once_and_with_a_report_of_losses(bench: Bench) -> None:
    for number in range(90):
        at_ms, queue_ms = round(number * 1000 / 15), max(0, number - 60) * 20
        for packet in bench.frame(number):
            packet.extensions.abs_send_time = at_ms * 262144 // 1000
            await bench.receiver._handle_rtp_packet(packet, arrival_time_ms=at_ms + 20 + queue_ms)
    told = [unpack_remb_fci(remb.fci)[0] for remb in bench.wire.of(RtcpPsfbPacket, 15)]
    assert told[-1] < 0.9 * told[0]
    assert any(isinstance(packet, RtcpRrPacket) for packet in bench.wire.sent)
    # A full network is not filled with estimates: each is less than the one before, or a while later.
    assert len(told) <= 30


@pytest.mark.parametrize("named", [True, False])
async def test_missing_packet_is_asked_for_and_taken_from_its_repetition(bench: Bench, named: bool) -> None:
    if not named:  # as FFmpeg's offer leaves it
        bench.receiver._rtx_sources = {}
    await bench.receive(*bench.frame(0))
    missing, *rest = bench.frame(1)
    await bench.receive(*rest, *bench.frame(2))
    await bench.until(lambda: bench.wire.of(RtcpRtpfbPacket, 1))
    assert bench.wire.of(RtcpRtpfbPacket, 1)[0].lost == [missing.sequence_number]
    assert len(bench.pictures) <= 1
    await bench.receive(wrap_rtx(missing, payload_type=98, sequence_number=5, ssrc=RTX_SSRC))
    await bench.until(lambda: len(bench.pictures) == 3)
    assert bench.counters["packets_recovered"] == 1


async def test_hole_without_repetition_ends_with_a_key_frame_request(bench: Bench) -> None:
    await bench.receive(*bench.frame(0))
    await bench.receive(*bench.frame(1)[1:])
    await bench.until(lambda: bench.wire.of(RtcpPsfbPacket, 1))
    await bench.receive(*bench.frame(2), *bench.frame(3, key=True))
    await bench.until(lambda: len(bench.pictures) == 2)
    assert bench.pictures == [0, 9000] and bench.counters["holes_given_up"] == 1


async def test_decoder_that_is_behind_is_cut_to_the_next_key_frame(bench: Bench) -> None:
    bench.pool.gate.clear()
    await bench.receive(*bench.frame(0))
    await bench.until(lambda: not bench.receiver._queue)
    for number in range(1, MAX_QUEUED["video"] + 4):
        await bench.receive(*bench.frame(number))
    assert bench.counters["video_decode_dropped"] == MAX_QUEUED["video"] and not bench.receiver._queue
    await bench.until(lambda: bench.wire.of(RtcpPsfbPacket, 1))
    await bench.receive(*bench.frame(20, key=True), *bench.frame(21))
    bench.pool.gate.set()
    await bench.until(lambda: len(bench.pictures) == 3)
    assert bench.pictures == [0, 60000, 63000]


async def test_damage_asks_for_a_key_frame_and_too_much_of_it_ends_the_input(bench: Bench) -> None:
    key = bytes([0x10, 0, 0, 0x9D, 0x01, 0x2A, 0, 0, 0, 0])
    for number in range(MAX_DECODE_ERRORS + 1):
        await bench.receive(RtpPacket(97, 1, number, number * 3000, SSRC, b"\x10" + key))
        await bench.until(lambda expected=number: bench.counters["video_decode_errors"] > expected)  # type: ignore[misc]
    await asyncio.wait_for(bench.ended.wait(), PATIENCE_S)
    assert bench.counters["input_undecodable"] == 1
    assert bench.wire.of(RtcpPsfbPacket, 1)


async def test_second_source_does_not_mix_in(bench: Bench) -> None:
    await bench.receive(*bench.frame(0))
    for packet in bench.frame(1):
        packet.ssrc = 77
        await bench.receive(packet)
    assert bench.counters["foreign_source"] > 0
    await bench.until(lambda: bench.pictures == [0])


async def test_malformed_and_unknown_packets_are_dropped(bench: Bench) -> None:
    await bench.receive(
        RtpPacket(97, 1, 65521, 0, SSRC, b"\x80"),
        RtpPacket(97, 1, 65522, 0, SSRC, b""),
        RtpPacket(98, 0, 3, 0, RTX_SSRC, b"\x00"),
        RtpPacket(98, 0, 4, 0, 5555, b"\x00\x01x"),
        RtpPacket(120, 1, 5, 0, SSRC, b"hello"),
    )
    assert bench.counters["packets_malformed"] == 1
    await bench.receive(*bench.frame(0))
    await bench.until(lambda: bench.pictures == [0])


async def test_stop_ends_tasks_and_tells_once_more(bench: Bench) -> None:
    await bench.receiver.stop()
    assert bench.ended.is_set() and all(task.done() for task in bench.receiver._tasks)
