"""The moving pictures of the load generator: a clip encoded once, sent by every session.

One encoding for all keeps the generator light: what a session costs here is RTP and encryption. The clip begins anew
when it ends, and each session starts at a key frame of its own, so that no two send the same at the same time. The
picture id in the payloads jumps at these places; only a receiver that goes by it would mind, and ours does not.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aiortc.mediastreams import MediaStreamTrack
from aiortc.rtcrtpparameters import RTCRtpCodecParameters
from aiortc.rtcrtpsender import RTCRtpSender

from server.clip import ClipFrame, ClipReader, Packet
from server.encoding import VideoEncoder

VIDEO_CLOCK_HZ = 90_000
# What the page allows its browser to send (MAX_BITRATE in web/connection.js).
BITRATE = 1_500_000
# Of a longer clip only the beginning is used: it is held encoded, 4 MB at most.
MAX_CLIP_S = 20.0
KEY_FRAME_PERIOD_S = 1.0
KEY_FRAME_INTERVAL_S = 0.3
# Further behind than this, as after a suspended process, frames are not caught up with.
MAX_BEHIND_S = 1.0


@dataclass(frozen=True, slots=True)
class ClipPicture:
    """One frame as RTP payloads."""

    payloads: tuple[bytes, ...]
    is_key_frame: bool


@dataclass(frozen=True, slots=True)
class EncodedClip:
    """Frames at an even rate; the first is a key frame."""

    frames: tuple[ClipPicture, ...]
    fps: float
    width: int
    height: int

    @property
    def key_frames(self) -> list[int]:
        """Where one can begin."""
        return [place for place, frame in enumerate(self.frames) if frame.is_key_frame]

    @property
    def bitrate(self) -> int:
        """Bit/s of the payloads."""
        return round(
            8 * self.fps * sum(len(part) for frame in self.frames for part in frame.payloads) / len(self.frames)
        )


def vp8() -> RTCRtpCodecParameters:
    """The codec of the clip, as aiortc offers it."""
    codecs = RTCRtpSender.getCapabilities("video").codecs
    found = next(codec for codec in codecs if codec.mimeType == "video/VP8")
    return RTCRtpCodecParameters(mimeType=found.mimeType, clockRate=found.clockRate)


def encode_clip(path: Path, fps: float, short_side_px: int) -> EncodedClip:
    """Read a video file and encode it as VP8 at an even `fps`; for a worker thread, it takes seconds.

    Args:
        short_side_px: a larger picture is scaled down to it, as the page does; a smaller one stays.

    Raises: server.clip.ClipError for a file that is no video.
    """
    encoder = VideoEncoder(vp8())
    period = max(1, round(KEY_FRAME_PERIOD_S * fps))
    frames: list[ClipPicture] = []
    with ClipReader(path) as reader:
        scale = min(1.0, short_side_px / min(reader.info.width, reader.info.height))
        width, height = (2 * max(1, round(scale * side / 2)) for side in (reader.info.width, reader.info.height))

        def take(frame: ClipFrame, until_s: float) -> None:
            """Encode a frame as often as it is shown before the next one's time."""
            while (place := len(frames)) / fps < min(until_s, MAX_CLIP_S):
                is_key = place % period == 0
                ticks = round(place * VIDEO_CLOCK_HZ / fps)
                frames.append(ClipPicture(tuple(encoder.encode(frame.picture, ticks, BITRATE, is_key)), is_key))

        shown: ClipFrame | None = None
        first_pts = 0
        for item in reader.items(width, height):
            if not isinstance(item, ClipFrame):
                continue
            at_s = float((item.pts - first_pts) * reader.info.time_base)
            if shown is None:
                first_pts, at_s = item.pts, 0.0
            else:
                take(shown, at_s)
            if at_s >= MAX_CLIP_S:
                break
            shown = item
        assert shown is not None  # the reader has decoded one to be there
        take(shown, max(at_s + 1 / float(reader.info.rate), 0.5 / fps))
    return EncodedClip(tuple(frames), fps, width, height)


class ClipTrack(MediaStreamTrack):
    """The clip over and over, in real time, for one session."""

    kind = "video"

    def __init__(
        self, clip: EncodedClip, session: int, on_sent: Callable[[float], None], counters: Counter[str]
    ) -> None:
        """`session` says at which key frame it begins; `on_sent` is told the instant of every frame."""
        super().__init__()
        self._clip = clip
        self._key_frames = clip.key_frames
        self._place = self._key_frames[session % len(self._key_frames)]
        self._on_sent = on_sent
        self._counters = counters
        self._began_at: float | None = None
        self._due_at = 0.0
        self._key_frame_at = float("-inf")

    async def recv(self) -> Packet:
        """Not used: the frames are payloads already."""
        raise NotImplementedError

    async def next(self) -> tuple[ClipPicture, int]:
        """Wait until the next frame is due; returns it and its time in 90 kHz."""
        now = time.monotonic()
        if self._began_at is None:
            self._began_at = self._due_at = now
        elif now - self._due_at > MAX_BEHIND_S:
            self._counters["camera_stalls"] += 1
            self._due_at = now
        elif now < self._due_at:
            await asyncio.sleep(self._due_at - now)
            now = time.monotonic()
        if now - self._due_at > 1 / self._clip.fps:
            self._counters["camera_late"] += 1
        self._due_at += 1 / self._clip.fps
        frame = self._clip.frames[self._place]
        self._place = (self._place + 1) % len(self._clip.frames)
        self._on_sent(now)
        return frame, round((now - self._began_at) * VIDEO_CLOCK_HZ)

    def ask_key_frame(self) -> None:
        """Go on at the next key frame of the clip; at most once in KEY_FRAME_INTERVAL_S."""
        now = time.monotonic()
        if now - self._key_frame_at < KEY_FRAME_INTERVAL_S:
            return
        self._key_frame_at = now
        self._counters["key_frames_asked"] += 1
        self._place = next((place for place in self._key_frames if place >= self._place), 0)
