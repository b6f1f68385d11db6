"""One peer connection: tracks, data channels and why the peer left. Alone knows RTCPeerConnection.

Private hooks into aiortc, each with its reason: `_install` (our receiver and senders into the transceivers),
`_collect` (the task that connects) and `_set_role`. tests/server/test_peer.py fails when an upgrade moves them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Protocol

import av
from aiortc import (
    RTCConfiguration,
    RTCDtlsTransport,
    RTCIceServer,
    RTCPeerConnection,
    RTCRtpSender,
    RTCRtpTransceiver,
    RTCSessionDescription,
)
from aiortc.codecs import get_capabilities
from aiortc.exceptions import OperationError
from aiortc.mediastreams import MediaStreamError
from aiortc.sdp import candidate_from_sdp

from server.channels import MAX_BUFFERED_BYTES, Channels, walled
from server.codecs import accept_h264_profiles
from server.decoding import Picture
from server.dtls import FirstFlight, check_digests_alone
from server.egress import DelayedAudio, OutgoingVideo
from server.errors import BadRequest, ServerError, Unsupported
from server.frames import CameraFrame, FrameMark, OutgoingFrame
from server.ice_guard import IceGuard
from server.rtp_receiver import MediaReceiver
from server.sdp_gate import (
    MAX_CANDIDATES,
    MAX_LINE_CHARS,
    Offer,
    check_offer,
    is_usable_candidate,
    with_bitrate_hints,
)
from server.sender import AudioSender, VideoSender
from server.settings import MediaSettings

__all__ = ["CameraFrame", "Feed", "FrameMark", "OutgoingFrame", "Peer", "PeerGone", "answer_offer"]

log = logging.getLogger(__name__)

NEGOTIATION_TIMEOUT_S = 5.0
CLOSE_TIMEOUT_S = 3.0
WATCH_S = 1.0
# One for a decode, one for an encode; audio is short enough to fit between.
POOL_THREADS = 2
CODECS = {"video": ("video/VP8", "video/H264", "video/rtx"), "audio": ("audio/opus",)}

accept_h264_profiles()


class PeerGone(Exception):
    """The peer left; for callers that end a task group with it. No method of Peer raises it by itself."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Feed(Protocol):
    """Where the tracks of a viewer come from."""

    def sender(self, kind: str, transport: RTCDtlsTransport) -> RTCRtpSender:
        """The sender of one media section."""
        ...


class Peer:
    """A connected (or connecting) browser or encoder. Made by `answer_offer` only."""

    def __init__(self, offer: Offer, settings: MediaSettings, *, publishes: bool = False, feed: Feed | None = None):
        self.answer_sdp = ""
        """The answer, all candidates of this server included."""
        self.video_delay_s = 0.0
        """Smoothed delay of the video pipeline; audio is held back that long. Settable."""
        self.connected_at: float | None = None
        """Monotonic seconds: ICE and DTLS were up; None until then."""
        self.has_sound = settings.audio and offer.sends("audio")
        """Whether this peer may send sound; it may begin at any time."""
        self.on_sound: Callable[[av.AudioFrame, float], None] | None = None
        """Told of decoded sound, with the instant at which it came. Settable."""
        self._counters: Counter[str] = Counter(candidates_refused=offer.candidates_refused)
        self._offer = offer
        self._settings = settings
        self._publishes = publishes
        self._feed = feed
        self._pool = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="peer-codec")
        self._guard = IceGuard(self._counters, settings.udp_range)
        self._channels = Channels(self._counters)
        self._pictures = OutgoingVideo(self._counters)
        self._sound = DelayedAudio(lambda: self.video_delay_s, self._counters)
        self._first_flight: FirstFlight | None = None
        self._video_sender: VideoSender | None = None
        self._candidates = 0
        self._slot: CameraFrame | None = None
        self._slot_changed = asyncio.Event()
        self._decoded = 0
        self._input_ended = False
        self._gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._deadline = time.monotonic() + settings.connect_timeout_s
        self._timer: asyncio.TimerHandle | None = None
        self._background: set[asyncio.Future[None]] = set()
        servers = [RTCIceServer(urls=url) for url in settings.ice_servers]
        # Explicit also when empty: aiortc's default asks a public STUN server.
        self._connection = RTCPeerConnection(RTCConfiguration(iceServers=servers))

    @property
    def counters(self) -> dict[str, int]:
        """Everything that was dropped, refused or repaired, by name; live, read only."""
        return self._counters

    async def next_frame(self) -> CameraFrame | None:
        """Wait for the newest decoded frame. A slot of one: newer ones overwrite, counted `camera_overwritten`.

        Returns: None once the track has ended or the peer is gone, and ever after.
        """
        while self._slot is None:
            if self._input_ended:
                return None
            self._slot_changed.clear()
            await self._slot_changed.wait()
        frame, self._slot = self._slot, None
        return frame

    async def next_sound(self) -> av.AudioFrame | None:
        """Wait for sound that is due beside the picture (`video_delay_s`); None once the peer is gone.

        For a peer that publishes; for others the sound goes back by itself.
        """
        try:
            return await self._sound.recv()
        except MediaStreamError:
            return None

    @property
    def last_packet_at(self) -> float:
        """Monotonic seconds: the last datagram of the peer, or its offer."""
        return self._guard.last_packet_at

    def send_frame(self, frame: OutgoingFrame) -> None:
        """Hand a picture to the encoder: this instant becomes its RTP timestamp. Never waits, never raises.

        At most two frames wait for the encoder; a third drops the oldest, counted `outgoing_dropped`.
        """
        self._pictures.push(frame, time.monotonic())

    def take_marks(self) -> list[FrameMark]:
        """Return the frames handed to the wire since the last call, oldest first; the newest 256 at most."""
        if self._video_sender is None:
            return []
        marks = list(self._video_sender.marks)
        self._video_sender.marks.clear()
        return marks

    def take_unsent(self) -> list[tuple[int, str]]:
        """Return (frame index, reason) of released pictures that never left since the last call; at most 256."""
        unsent = list(self._pictures.unsent)
        self._pictures.unsent.clear()
        return unsent

    async def next_message(self) -> str | None:
        """Wait for the next text of the control channel; None once the peer is gone, and ever after.

        At most 64 wait; a further one drops the oldest, counted `control_dropped`.
        """
        return await self._channels.next_message()

    def send_control(self, text: str) -> None:
        """Send on the control channel, before its opening at that; counted `control_unsent` after its end."""
        self._channels.send("control", text)

    def send_telemetry(self, text: str) -> None:
        """Send on the telemetry channel; counted `telemetry_unsent` unless open and below 64 KiB buffered."""
        self._channels.send("telemetry", text, max_buffered=MAX_BUFFERED_BYTES)

    async def add_candidates(self, candidates: Sequence[Mapping[str, object]]) -> None:
        """Add trickled candidates: mappings with candidate, sdpMid, sdpMLineIndex; an empty candidate ends.

        Those that are unusable are skipped and counted `candidates_refused`; too late is harmless.
        """
        for item in candidates:
            text = item.get("candidate")
            # The end is not passed on: after it aioice fails although the browser may still reach this server.
            if text in ("", None) or item.get("sdpMid", self._offer.primary_mid) != self._offer.primary_mid:
                continue
            is_fit = isinstance(text, str) and len(text) <= MAX_LINE_CHARS and is_usable_candidate(text)
            if not is_fit or self._candidates >= MAX_CANDIDATES:
                self._counters["candidates_refused"] += 1
                continue
            self._candidates += 1
            try:
                candidate = candidate_from_sdp(str(text).removeprefix("candidate:"))
                await self._transceiver("video").receiver.transport.transport.addRemoteCandidate(candidate)
            except ValueError:
                self._counters["candidates_refused"] += 1

    async def wait_until_gone(self) -> str:
        """Wait for the end: `never_connected`, `closed_by_peer`, `vanished` or `failed`."""
        return await asyncio.shield(self._gone)

    async def _negotiate(self) -> None:
        """Answer the offer. Any exception at all may come out of aiortc here."""
        for kind in self._offer.kinds:
            if kind != "application":
                self._install(self._connection.addTransceiver(kind))
        self._connection.on("datachannel", walled(self._channels.adopt, self._counters))
        self._connection.on("connectionstatechange", self._on_state)
        self._collect()
        await self._connection.setRemoteDescription(RTCSessionDescription(self._offer.sdp, "offer"))
        transport = self._transceiver("video").receiver.transport
        self._guard.attach(transport.transport.iceGatherer)
        check_digests_alone(transport)
        if self._offer.setup != "passive":
            # As DTLS client aiortc fails against every peer with an RSA certificate (aiortc issue 1434).
            transport._set_role("server")
        else:
            self._first_flight = FirstFlight(transport.transport, self._counters)
        await self._connection.setLocalDescription(await self._connection.createAnswer())
        self.answer_sdp = with_bitrate_hints(self._connection.localDescription.sdp, self._settings)
        self._deadline = time.monotonic() + self._settings.connect_timeout_s
        self._watch()

    def _install(self, transceiver: RTCRtpTransceiver) -> None:
        """Put our receiver and sender in the place of the stock ones; aiortc has no factory for them."""
        kind, transport = transceiver.kind, transceiver.receiver.transport
        sender: RTCRtpSender
        deliver: Callable[[Picture, float], None]
        if kind == "video":
            sender = self._video_sender = VideoSender(
                self._pictures, transport, self._pool, self._settings, self._counters
            )
            deliver, ended = self._take_picture, self._end_input
        else:
            sender = AudioSender(self._sound, transport, self._pool)
            deliver, ended = self._take_sound, self._sound.stop
        if self._feed is not None:
            sender = self._feed.sender(kind, transport)
        receiver = MediaReceiver(kind, transport, self._pool, self._settings, self._counters, deliver, ended)
        sender._stream_id = transceiver.sender._stream_id  # one stream: the browser keeps them in step
        receiver._set_rtcp_ssrc(sender._ssrc)
        transceiver._RTCRtpTransceiver__sender = sender  # type: ignore[attr-defined]
        transceiver._RTCRtpTransceiver__receiver = receiver  # type: ignore[attr-defined]
        capabilities = get_capabilities(kind).codecs
        transceiver.setCodecPreferences(
            [codec for name in CODECS[kind] for codec in capabilities if codec.mimeType == name]
        )
        if kind == "audio" and not self._settings.audio:
            transceiver.direction = "inactive"
        elif self._publishes:
            transceiver.direction = "recvonly"
        elif self._feed is not None:
            transceiver.direction = "sendonly"

    def _collect(self) -> None:
        """Keep the tasks in which the connection connects: aiortc forgets them, and close would leave them."""
        connect: Callable[[], Awaitable[None]] = self._connection._RTCPeerConnection__connect  # type: ignore[attr-defined]

        async def kept() -> None:
            task = asyncio.current_task()
            assert task is not None
            self._background.add(task)
            task.add_done_callback(self._background.discard)
            try:
                await connect()
            except Exception as error:  # noqa: BLE001  (the wall: a task nobody waits for)
                self._counters["connect_errors"] += 1
                log.info("connecting failed: %r", error)
                self._leave("failed")

        self._connection._RTCPeerConnection__connect = kept  # type: ignore[attr-defined]

    def _transceiver(self, kind: str) -> RTCRtpTransceiver:
        return next(item for item in self._connection.getTransceivers() if item.kind == kind)

    def _take_picture(self, picture: Picture, arrived_at: float) -> None:
        assert isinstance(picture, av.VideoFrame)
        if self._slot is not None:
            self._counters["camera_overwritten"] += 1
        self._slot = CameraFrame(self._decoded, arrived_at, picture)
        self._decoded += 1
        self._slot_changed.set()

    def _take_sound(self, sound: Picture, arrived_at: float) -> None:
        assert isinstance(sound, av.AudioFrame)
        self._sound.push(sound, arrived_at)
        if self.on_sound is not None:
            self.on_sound(sound, arrived_at)

    def _end_input(self) -> None:
        self._input_ended = True
        self._slot_changed.set()

    def _on_state(self) -> None:
        state = self._connection.connectionState
        if state == "connected":
            self._counters["connected"] = 1
            self.connected_at = self.connected_at or time.monotonic()
        elif state == "failed":
            self._leave("failed")
        elif state == "closed":
            self._leave("closed_by_peer")

    def _watch(self) -> None:
        """Once a second: is it connected in time, and is it still there? aiortc notices after 33 s or never."""
        now = time.monotonic()
        if not self._counters["connected"]:
            if now >= self._deadline:
                self._leave("never_connected")
        elif now - self._guard.last_packet_at > self._settings.vanish_timeout_s:
            self._leave("vanished")
        if not self._gone.done():
            wait_s = min(WATCH_S, self._settings.connect_timeout_s, self._settings.vanish_timeout_s / 4)
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._watch)

    def _leave(self, reason: str) -> None:
        if not self._gone.done():
            self._gone.set_result(reason)
        self._end_input()
        self._channels.end()

    async def _close(self) -> None:
        """Close everything, each step with a guard and a timeout of its own."""
        self._leave("closed_by_peer")
        if self._timer is not None:
            self._timer.cancel()
        if self._first_flight is not None:
            self._first_flight.stop()
        transports = [item.receiver.transport for item in self._connection.getTransceivers()]
        if self._connection.sctp is not None:
            transports.append(self._connection.sctp.transport)
        readers = {item._task for item in transports if item._task is not None}
        await self._step("connection", self._connection.close())
        for transport in transports:
            await self._step("dtls", transport.stop())
            await self._step("ice", transport.transport.stop())
        self._pictures.stop()
        self._sound.stop()
        if left := readers | self._background:
            _, late = await asyncio.wait(left, timeout=CLOSE_TIMEOUT_S)
            for task in late:
                task.cancel()
        loop = asyncio.get_running_loop()
        await self._step("pool", loop.run_in_executor(None, self._pool.shutdown))

    async def _step(self, name: str, step: Awaitable[None]) -> None:
        try:
            await asyncio.wait_for(step, CLOSE_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001  (the wall: no step may keep the next from running)
            self._counters["close_errors"] += 1
            log.warning("closing the %s of a peer failed: %r", name, error)


@asynccontextmanager
async def answer_offer(
    offer_sdp: str, settings: MediaSettings, *, publishes: bool = False, feed: Feed | None = None
) -> AsyncIterator[Peer]:
    """Answer an offer and hold the connection open for the body of the `async with`.

    The answer is complete on entry, the connection usually not; `wait_until_gone` says `never_connected` when it
    is not up `settings.connect_timeout_s` later. On exit everything is closed: no task, thread or socket stays.

    Args:
        publishes: nothing is sent back to this peer.
        feed: this peer only watches, what comes from there.

    Raises: BadRequest, Unsupported or TooLarge, on entry, if the offer cannot be answered; nothing else.
    """
    peer = Peer(check_offer(offer_sdp, watches=feed is not None), settings, publishes=publishes, feed=feed)
    try:
        await _negotiated(peer)
        yield peer
    finally:
        # Shielded: a second cancellation must not leave sockets behind.
        await asyncio.shield(asyncio.create_task(peer._close(), name="peer/close"))


async def _negotiated(peer: Peer) -> None:
    try:
        async with asyncio.timeout(NEGOTIATION_TIMEOUT_S):
            await peer._negotiate()
    except ServerError:
        raise
    except OperationError as error:
        raise Unsupported(
            "no common codec: offer VP8, or H.264 with packetization-mode 1 (Baseline, Main or High), and Opus"
        ) from error
    except TimeoutError as error:
        raise BadRequest(f"the offer could not be answered in {NEGOTIATION_TIMEOUT_S:g} s") from error
    except Exception as error:  # the wall: 1500 mutated offers raised seven kinds of exception
        log.info("an offer could not be answered: %r", error)
        raise BadRequest("the offer could not be read; send the SDP as the browser made it") from error
