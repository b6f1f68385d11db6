"""One encoder of a live picture: on a thread, by a clock of its own, with key frames on demand but not too many."""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import Executor

from aiortc.rtcrtpparameters import RTCRtpCodecParameters

from server.egress import ReleasedFrame
from server.encoding import VideoEncoder

KEY_FRAME_INTERVAL_S = 0.3
# The encoder is shown no longer gap than this, in 90 kHz.
MAX_STEP_TICKS = 18000


class LiveEncoder:
    """Pictures as they are released -> RTP payloads.

    Left-out pictures take no time for the encoder: it would spend what they saved on the next one, which came out five
    times as long, and on a narrow network more had to be left out for it, and so on.
    """

    def __init__(self, pool: Executor) -> None:
        self.made_key_frame = False
        """Whether the last picture was made a key frame because somebody asked."""
        self._pool = pool
        self._encoder: VideoEncoder | None = None
        self._last_ticks = self._encoder_ticks = 0
        self._key_frame_asked = False
        self._key_frame_at = -math.inf

    def ask_key_frame(self) -> None:
        """Have a key frame soon."""
        self._key_frame_asked = True

    def leave_out(self, released: ReleasedFrame) -> None:
        """Pass a picture over."""
        self._last_ticks = released.ticks

    async def encode(
        self,
        codec: RTCRtpCodecParameters,
        released: ReleasedFrame,
        bitrate: int,
        now: float,
        key_frame_interval_s: float = KEY_FRAME_INTERVAL_S,
    ) -> list[bytes]:
        """Encode a picture; nothing comes of one that the encoder skips. What it raises, it begins anew after."""
        step, self._last_ticks = released.ticks - self._last_ticks, released.ticks
        self._encoder_ticks += min(max(step, 1), MAX_STEP_TICKS)
        if self._encoder is None:
            self._encoder = VideoEncoder(codec)
        self.made_key_frame = self._key_frame_asked and now - self._key_frame_at >= key_frame_interval_s
        if self.made_key_frame:
            self._key_frame_asked, self._key_frame_at = False, now
        encoder, self._encoder = self._encoder, None
        payloads = await asyncio.get_running_loop().run_in_executor(
            self._pool, encoder.encode, released.frame.rgb, self._encoder_ticks, bitrate, self.made_key_frame
        )
        self._encoder = encoder
        return payloads
