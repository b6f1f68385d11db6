"""A peer against real aiortc clients over loopback."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import av
import numpy as np
import pytest
from aiortc import RTCConfiguration, RTCPeerConnection, RTCRtpReceiver, RTCRtpSender, RTCSessionDescription
from aiortc.mediastreams import AudioStreamTrack, MediaStreamTrack, VideoStreamTrack
from aiortc.rtp import RtpPacket

from server.channels import MAX_BAD_MESSAGES, walled
from server.errors import ServerError
from server.peer import FrameMark, OutgoingFrame, Peer, answer_offer
from server.rtp_receiver import MediaReceiver
from server.settings import MediaSettings

PATIENCE_S = 30.0
SETTINGS = MediaSettings()


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client too: aioice leaves 127.0.0.1 out, and no test sends anywhere else."""
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])


class Camera(VideoStreamTrack):
    """Noise at 30 fps, so that a frame takes several packets."""

    def __init__(self) -> None:
        super().__init__()
        self.size = (240, 320)
        self._noise = np.random.default_rng(0)

    async def recv(self) -> av.VideoFrame:
        pts, time_base = await self.next_timestamp()
        picture = self._noise.integers(0, 255, (*self.size, 3), np.uint8)
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = pts, time_base
        return frame


class Client:
    """A plain aiortc peer with a camera, a microphone and the page's two channels."""

    def __init__(self, codec: str = "video/VP8") -> None:
        self.connection = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.camera = Camera()
        self.tracks: dict[str, MediaStreamTrack] = {}
        self.messages: asyncio.Queue[str] = asyncio.Queue()
        self.connection.on("track", lambda track: self.tracks.setdefault(track.kind, track))
        transceiver = self.connection.addTransceiver(self.camera)
        capabilities = RTCRtpSender.getCapabilities("video")
        transceiver.setCodecPreferences([c for c in capabilities.codecs if c.mimeType in (codec, "video/rtx")])
        self.connection.addTrack(AudioStreamTrack())
        self.control = self.connection.createDataChannel("control")
        self.telemetry = self.connection.createDataChannel("telemetry", ordered=False, maxRetransmits=0)
        self.control.on("message", self.messages.put_nowait)

    async def offer(self) -> str:
        await self.connection.setLocalDescription(await self.connection.createOffer())
        return self.connection.localDescription.sdp

    async def accept(self, answer: str) -> None:
        await self.connection.setRemoteDescription(RTCSessionDescription(answer, "answer"))

    async def opened(self) -> None:
        if self.control.readyState != "open":
            opened = asyncio.Event()
            self.control.on("open", opened.set)
            await asyncio.wait_for(opened.wait(), PATIENCE_S)

    def drop_sent(self, lost: Callable[[RtpPacket], bool]) -> None:
        """Lose what `lost` says of the packets that the camera sends, the repeated ones included."""
        transport = self.connection.getSenders()[0].transport
        send = transport._send_rtp

        async def lossy(data: bytes) -> None:
            if 192 <= data[1] <= 223 or not lost(RtpPacket.parse(data)):
                await send(data)

        transport._send_rtp = lossy  # type: ignore[method-assign]


@asynccontextmanager
async def connected(settings: MediaSettings = SETTINGS, codec: str = "video/VP8") -> AsyncIterator[tuple[Peer, Client]]:
    client = Client(codec)
    try:
        async with answer_offer(await client.offer(), settings) as peer:
            await client.accept(peer.answer_sdp)
            yield peer, client
    finally:
        await client.connection.close()


async def frame_of(peer: Peer) -> av.VideoFrame:
    frame = await asyncio.wait_for(peer.next_frame(), PATIENCE_S)
    assert frame is not None
    return frame.picture


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("codec", ["video/VP8", "video/H264"])
async def test_frames_arrive_numbered_and_go_back(codec: str) -> None:
    async with connected(codec=codec) as (peer, client):
        indices, arrivals = [], []
        for _ in range(10):
            frame = await asyncio.wait_for(peer.next_frame(), PATIENCE_S)
            assert frame is not None and (frame.picture.width, frame.picture.height) == (320, 240)
            indices.append(frame.index)
            arrivals.append(frame.arrived_at)
            peer.send_frame(OutgoingFrame(frame.index, frame.arrived_at, np.full((64, 64, 3), 200, np.uint8), 1))
        assert indices == sorted(set(indices)) and arrivals == sorted(arrivals)
        picture = await asyncio.wait_for(client.tracks["video"].recv(), PATIENCE_S)
        assert isinstance(picture, av.VideoFrame)
        assert abs(float(picture.to_ndarray(format="rgb24").mean()) - 200) < 10
        assert isinstance(peer._transceiver("video").receiver, MediaReceiver)


async def test_marks_carry_the_timestamps_of_the_wire_and_the_right_frame() -> None:
    async with connected() as (peer, client):
        wire: list[int] = []
        note_timestamps(client.connection.getReceivers()[0], wire)
        marks: list[FrameMark] = []
        for index in range(12):
            await frame_of(peer)
            peer.send_frame(OutgoingFrame(index, float(index), np.full((64, 64, 3), 20 * index, np.uint8), index % 2))
            marks += peer.take_marks()
        async with asyncio.timeout(PATIENCE_S):
            while marks[-1].index != 11:
                await asyncio.sleep(0.01)
                marks += peer.take_marks()
        await until(lambda: len(wire) == len(marks))
        assert [mark.rtp_timestamp for mark in marks] == wire
        for mark in marks[:-1]:  # a stock receiver keeps the last one until the next begins
            picture = await asyncio.wait_for(client.tracks["video"].recv(), PATIENCE_S)
            assert isinstance(picture, av.VideoFrame) and picture.pts is not None
            assert (wire[0] + picture.pts) & 0xFFFFFFFF == mark.rtp_timestamp
            assert abs(float(picture.to_ndarray(format="rgb24").mean()) - 20 * mark.index) < 8
            assert (mark.arrived_at, mark.kind) == (float(mark.index), mark.index % 2)


def note_timestamps(receiver: RTCRtpReceiver, wire: list[int]) -> None:
    handle = receiver._handle_rtp_packet

    async def noted(packet: RtpPacket, arrival_time_ms: int) -> None:
        if packet.payload and packet.timestamp not in wire:
            wire.append(packet.timestamp)
        await handle(packet, arrival_time_ms)

    receiver._handle_rtp_packet = noted  # type: ignore[method-assign]


async def test_packet_lost_for_good_costs_a_key_frame_and_no_freeze() -> None:
    async with connected() as (peer, client):
        await frame_of(peer)
        victim: list[int] = []

        def lost(packet: RtpPacket) -> bool:
            repeated = packet.payload_type == 98
            sequence = int.from_bytes(packet.payload[:2]) if repeated else packet.sequence_number
            if not victim and not repeated and not packet.marker:
                victim.append(sequence)
            return sequence in victim

        client.drop_sent(lost)
        await until(lambda: peer.counters.get("holes_given_up"))
        decoded = peer._decoded
        await until(lambda: peer._decoded > decoded + 10)
        assert peer.counters["key_frames_asked"] >= 1
        assert "video_decode_errors" not in peer.counters


async def test_every_twelfth_packet_lost_is_repaired_without_damage() -> None:
    async with connected() as (peer, client):
        await frame_of(peer)
        chance = random.Random(1)
        client.drop_sent(lambda packet: chance.random() < 1 / 12)
        decoded = peer._decoded
        await until(lambda: peer._decoded > decoded + 60)
        assert peer.counters["packets_recovered"] > 0
        assert "video_decode_errors" not in peer.counters


async def test_unread_camera_keeps_one_frame() -> None:
    async with connected() as (peer, _):
        await until(lambda: peer.counters.get("camera_overwritten", 0) >= 5)
        frame = await asyncio.wait_for(peer.next_frame(), PATIENCE_S)
        assert frame is not None and frame.index >= 5


async def test_size_may_change_in_mid_stream() -> None:
    async with connected() as (peer, client):
        assert (await frame_of(peer)).width == 320
        client.camera.size = (120, 160)
        async with asyncio.timeout(PATIENCE_S):
            while (await frame_of(peer)).width != 160:
                pass


@pytest.mark.parametrize("codec", ["video/VP8", "video/H264"])
async def test_picture_over_the_bound_ends_the_input(codec: str) -> None:
    async with connected(MediaSettings(max_input_pixels=160 * 120), codec) as (peer, client):
        client.camera.size = (120, 160)
        assert (await frame_of(peer)).height == 120
        client.camera.size = (240, 320)
        async with asyncio.timeout(PATIENCE_S):
            while await peer.next_frame() is not None:
                pass
        assert peer.counters["input_too_large"] == 1
        assert await peer.next_frame() is None


async def test_sound_comes_back_in_the_stream_of_the_picture() -> None:
    async with connected() as (peer, client):
        sound = await asyncio.wait_for(client.tracks["audio"].recv(), PATIENCE_S)
        assert isinstance(sound, av.AudioFrame) and sound.sample_rate == 48000
        streams = [line.split()[0] for line in peer.answer_sdp.splitlines() if line.startswith("a=msid:")]
        assert len(streams) == 2 and len(set(streams)) == 1


async def test_sound_can_be_switched_off() -> None:
    async with connected(MediaSettings(audio=False)) as (peer, _):
        await frame_of(peer)
        audio = peer.answer_sdp[peer.answer_sdp.index("m=audio") :]
        assert "a=inactive" in audio.split("m=application")[0].splitlines()


async def test_stray_datagrams_do_no_harm() -> None:
    async with connected() as (peer, _):
        await frame_of(peer)
        ports = {line.split()[5] for line in peer.answer_sdp.splitlines() if line.startswith("a=candidate:")}
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            for port in ports:
                for junk in (b"", b"\x16\xfe\xfd", b"\x80\x60" + bytes(20), b"\x00\x01junk", b"\xff" * 1500):
                    stranger.sendto(junk, ("127.0.0.1", int(port)))
        await until(lambda: peer.counters.get("datagrams_foreign", 0) >= 3 * len(ports))
        assert peer.counters["datagrams_empty"] == len(ports)
        decoded = peer._decoded
        await until(lambda: peer._decoded > decoded + 5)


async def test_bad_messages_and_channels_do_no_harm() -> None:
    async with connected() as (peer, client):
        await client.opened()
        stranger = client.connection.createDataChannel("files")
        client.control.send(b"\x00\x01")
        client.control.send("x" * 8193)
        client.control.send("ok")
        assert await asyncio.wait_for(peer.next_message(), PATIENCE_S) == "ok"
        answers = [await asyncio.wait_for(client.messages.get(), PATIENCE_S) for _ in range(2)]
        assert ['"binary"' in answers[0], '"too_large"' in answers[1]] == [True, True]
        await until(lambda: peer.counters.get("channels_refused") and stranger.readyState == "closed")
        for number in range(100):
            client.control.send(str(number))
        await until(lambda: peer.counters.get("control_dropped", 0) == 36)
        assert await peer.next_message() == "36"
        await frame_of(peer)


async def test_control_channel_of_a_peer_that_only_sends_rubbish_is_closed() -> None:
    async with connected() as (peer, client):
        await client.opened()
        for _ in range(MAX_BAD_MESSAGES + 1):
            client.control.send(b"rubbish")
        await until(lambda: client.control.readyState == "closed")
        await frame_of(peer)


@pytest.mark.parametrize("handler", ["adopt", "_take_control", "_take_telemetry"])
async def test_a_handler_of_the_channels_that_raises_ends_nothing(
    handler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(f"server.channels.Channels.{handler}", fail)
    async with connected() as (peer, client):
        await client.opened()
        client.control.send("one")
        client.telemetry.send("two")
        await until(lambda: peer.counters.get("handler_errors"))
        first = await frame_of(peer)
        assert (await frame_of(peer)).pts > first.pts  # type: ignore[operator]


def test_nothing_escapes_a_walled_handler() -> None:
    counters: Counter[str] = Counter()
    walled(int, counters)("no number")
    assert counters["handler_errors"] == 1


async def test_messages_go_both_ways_early_control_is_kept_and_early_telemetry_counted() -> None:
    async with connected() as (peer, client):
        peer.send_telemetry("too early")
        peer.send_control("early")
        assert peer.counters["telemetry_unsent"] == 1
        await client.opened()
        client.control.send("ping")
        assert await asyncio.wait_for(peer.next_message(), PATIENCE_S) == "ping"
        peer.send_control("pong")
        assert [await asyncio.wait_for(client.messages.get(), PATIENCE_S) for _ in range(2)] == ["early", "pong"]


async def test_peer_that_closes_is_gone_and_everybody_who_waits_is_told() -> None:
    async with connected() as (peer, client):
        await frame_of(peer)
        message = asyncio.create_task(peer.next_message())
        await client.connection.close()
        assert await asyncio.wait_for(peer.wait_until_gone(), PATIENCE_S) == "closed_by_peer"
        assert await asyncio.wait_for(message, PATIENCE_S) is None
        async with asyncio.timeout(PATIENCE_S):
            while await peer.next_frame() is not None:
                pass


async def test_peer_that_falls_silent_has_vanished() -> None:
    async with connected(MediaSettings(vanish_timeout_s=2.0)) as (peer, client):
        await frame_of(peer)
        for protocol in client.connection.getSenders()[0].transport.transport._connection._protocols:
            protocol.transport.sendto = lambda *_: None  # type: ignore[method-assign]
        assert await asyncio.wait_for(peer.wait_until_gone(), PATIENCE_S) == "vanished"


async def test_offer_that_never_connects_is_given_up() -> None:
    client = Client()
    offer = await client.offer()
    try:
        before, tasks = open_files(), asyncio.all_tasks()
        async with answer_offer(offer, MediaSettings(connect_timeout_s=0.3)) as peer:
            assert await asyncio.wait_for(peer.wait_until_gone(), PATIENCE_S) == "never_connected"
            assert open_files() > before and asyncio.all_tasks() - tasks
        assert open_files() == before and not asyncio.all_tasks() - tasks
    finally:
        await client.connection.close()


async def test_trickled_candidates_are_sieved() -> None:
    async with connected() as (peer, _):
        good = {"candidate": "candidate:1 1 udp 1 127.0.0.1 50123 typ host", "sdpMid": "0", "sdpMLineIndex": 0}
        bad = [{"candidate": text, "sdpMid": "0"} for text in ("x", "candidate:1 1 udp 1 10.0.0.1 53 typ host", 7)]
        await peer.add_candidates([good, *bad, {"candidate": "", "sdpMid": "0"}, {"sdpMid": "1"}])
        assert peer.counters["candidates_refused"] == 3
        await frame_of(peer)
        await peer.add_candidates(
            [{**good, "candidate": f"candidate:1 1 udp 1 10.0.0.{n} 5000 typ host"} for n in range(30)]
        )
        assert peer.counters["candidates_refused"] == 3 + 7


async def test_answer_is_dtls_server_also_for_active_offers_and_client_for_passive_ones() -> None:
    client = Client()
    offer = await client.offer()
    try:
        for role, answer in (("actpass", "passive"), ("active", "passive"), ("passive", "active")):
            async with answer_offer(offer.replace("a=setup:actpass", f"a=setup:{role}"), SETTINGS) as peer:
                lines = {line for line in peer.answer_sdp.splitlines() if line.startswith("a=setup:")}
                assert lines == {f"a=setup:{answer}"}
    finally:
        await client.connection.close()


async def test_twenty_sessions_leave_nothing() -> None:
    files = 0
    for cycle in range(20):
        async with connected() as (peer, client):
            await frame_of(peer)
            if cycle % 2:
                await client.connection.close()
        await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
        assert not [thread.name for thread in threading.enumerate() if "codec" in thread.name or "decod" in thread.name]
        if cycle == 2:
            files = open_files()
    assert open_files() <= files


async def test_cancelled_session_leaves_nothing() -> None:
    client, entered = Client(), asyncio.Event()
    offer = await client.offer()
    before = open_files()

    async def session() -> None:
        async with answer_offer(offer, SETTINGS):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(session())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: open_files() == before)
    await client.connection.close()
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})


async def test_broken_offers_raise_server_errors_and_leave_nothing() -> None:
    client = Client()
    lines = (await client.offer()).splitlines()
    before = open_files()
    answered = 0
    for text in broken_offers(lines):
        try:
            async with answer_offer(text, SETTINGS):
                answered += 1
        except ServerError as refusal:
            assert refusal.status in (400, 413, 422) and str(refusal)
    assert answered > 10  # not every mutation breaks an offer
    assert open_files() == before
    await client.connection.close()
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})


def broken_offers(lines: list[str]) -> list[str]:
    """Each line left out, each value cut, and some lines mixed up at random."""
    chance = random.Random(7)
    corpus = [lines[:place] + lines[place + 1 :] for place in range(len(lines))]
    corpus += [[*lines[:place], line[: len(line) // 2], *lines[place + 1 :]] for place, line in enumerate(lines)]
    for _ in range(60):
        mixed = list(lines)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(mixed))
            words = mixed[place].split(" ")
            words[chance.randrange(len(words))] = chance.choice(["", "-1", "99999999999999", "a:b", "0.0.0.0", "*"])
            mixed[place] = " ".join(words)
        corpus.append(mixed)
    return ["\r\n".join(text) + "\r\n" for text in corpus]


def open_files() -> int:
    return len(list(Path(f"/proc/{os.getpid()}/fd").iterdir()))
