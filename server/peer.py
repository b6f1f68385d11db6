"""One peer connection: tracks, data channels and why the peer left. Alone knows RTCPeerConnection."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from server.frames import CameraFrame, FrameMark, OutgoingFrame
from server.settings import MediaSettings

__all__ = ["CameraFrame", "FrameMark", "OutgoingFrame", "Peer", "PeerGone", "answer_offer"]


class PeerGone(Exception):
    """The peer left; for callers that end a task group with it. No method of Peer raises it by itself."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Peer:
    """A connected (or connecting) browser. Made by `answer_offer` only."""

    answer_sdp: str
    """The answer, all candidates of this server included."""
    video_delay_s: float
    """Smoothed delay of the video pipeline; audio is held back that long. Settable, 0 at first."""
    counters: dict[str, int]
    """Everything that was dropped, refused or repaired, by name; live, read only."""

    async def next_frame(self) -> CameraFrame | None:
        """Wait for the newest decoded frame. A slot of one: newer frames overwrite, counted `camera_overwritten`.

        Returns: None once the track has ended or the peer is gone, and ever after.
        """
        raise NotImplementedError

    def send_frame(self, frame: OutgoingFrame) -> None:
        """Hand a picture to the encoder now: this instant becomes its RTP timestamp. Never waits, never raises.

        At most two frames wait for the encoder; a third drops the oldest, counted `outgoing_dropped`.
        """
        raise NotImplementedError

    def take_marks(self) -> list[FrameMark]:
        """Return the frames handed to the wire since the last call, oldest first; the newest 256 at most."""
        raise NotImplementedError

    async def next_message(self) -> str | None:
        """Wait for the next text of the control channel; None once the peer is gone, and ever after.

        At most 64 wait; a further one drops the oldest, counted `control_dropped`.
        """
        raise NotImplementedError

    def send_control(self, text: str) -> None:
        """Send on the control channel; counted `control_unsent` while the channel is not open. Never raises."""
        raise NotImplementedError

    def send_telemetry(self, text: str) -> None:
        """Send on the telemetry channel; counted `telemetry_unsent` unless open and below 64 KiB buffered."""
        raise NotImplementedError

    async def add_candidates(self, candidates: Sequence[Mapping[str, object]]) -> None:
        """Add trickled candidates: mappings with candidate, sdpMid, sdpMLineIndex; an empty candidate ends.

        Those that are unusable are skipped and counted `candidates_refused`; too late is harmless.
        """
        raise NotImplementedError

    async def wait_until_gone(self) -> str:
        """Wait for the end: `never_connected`, `closed_by_peer`, `vanished`, `failed` or `input_too_large`."""
        raise NotImplementedError


@asynccontextmanager
async def answer_offer(offer_sdp: str, settings: MediaSettings) -> AsyncIterator[Peer]:
    """Answer an offer and hold the connection open for the body of the `async with`.

    The answer is complete on entry, the connection usually not; `wait_until_gone` says `never_connected` when it is
    not up `settings.connect_timeout_s` later. On exit everything is closed: no task, thread or socket stays.

    Raises: BadRequest, Unsupported or TooLarge, on entry, for any offer that cannot be answered; nothing else.
    """
    raise NotImplementedError
    yield Peer()
