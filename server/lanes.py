"""Encoders of a broadcast: one for all viewers of a codec, and a second while some of them have a narrow network.

A lane goes at what the slowest of its viewers takes. A viewer that takes less than half of what others do would spoil
the picture of all, so it goes over to a narrow lane, and back when its network is better: one encoder while all have
it good, two at most, however many and however bad the viewers are. What this beat: one lane at the median of all, where
a pair got the bitrate of its worse half, and a slow one among three a picture that stood still.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from concurrent.futures import Executor

from aiortc.codecs import depayload
from aiortc.mediastreams import MediaStreamTrack
from aiortc.rtcrtpparameters import RTCRtpCodecParameters

from server.egress import OutgoingVideo, ReleasedFrame
from server.encoding import FALL_INTERVAL_S, STEP
from server.frames import OutgoingFrame
from server.live_encoder import LiveEncoder
from server.reassembly import is_h264_key_frame, is_vp8_key_frame
from server.settings import MediaSettings
from server.viewers import Encoded, Pictures

log = logging.getLogger(__name__)

# Of the most that a viewer takes: who takes less, and has complained, goes to the narrow lane; who takes more, back.
NARROW, WIDE = 0.5, 0.75


class Lane:
    """One encoder and those who get what it makes. Lives while somebody does."""

    def __init__(
        self,
        codec: RTCRtpCodecParameters,
        executor: Executor,
        counters: Counter[str],
        bitrate: int,
        first_at: float,
    ) -> None:
        """first_at: the instant of tick 0, the same for lanes between which viewers go."""
        self.viewers: set[Pictures] = set()
        self.bitrate = bitrate
        """At which it encodes now, bit/s."""
        self._changed_at = 0.0
        self._codec = codec
        self._counters = counters
        self._pictures = OutgoingVideo(counters, first_at)
        self._encoder = LiveEncoder(executor)
        self._task = asyncio.create_task(self._run(), name=f"broadcast/{codec.name.lower()}")

    def push(self, frame: OutgoingFrame, now: float) -> None:
        """Hand a picture to the encoder; two wait at most, a third drops the oldest, `outgoing_dropped`."""
        self._pictures.push(frame, now)

    def add(self, viewer: Pictures) -> None:
        """Send to this viewer too, from a key frame on."""
        if not viewer.policy.has_heard:
            viewer.policy.begin_at(self.bitrate)
        viewer.ask_key_frame = self._encoder.ask_key_frame
        viewer.begin_anew()
        self.viewers.add(viewer)
        self._encoder.ask_key_frame()

    def stop(self) -> None:
        """End the encoder; an encode that runs ends in the pool and its result is dropped."""
        self._task.cancel()

    async def _run(self) -> None:
        while True:
            released = await self._pictures.next()
            now = time.monotonic()
            # While most have no room: who then misses a picture alone needs a key frame, for which all pay.
            if 2 * sum(not viewer.policy.has_room(now) for viewer in self.viewers) > len(self.viewers):
                self._counters["network_behind"] += 1
                self._encoder.leave_out(released)
                continue
            try:
                frame = await self._encoded(released, now)
            except Exception:  # the wall: a picture that cannot be encoded is lost, the stream is not
                self._counters["encode_errors"] += 1
                log.exception("a picture of a broadcast could not be encoded")
                continue
            if frame is None:
                self._counters["encoder_skipped"] += 1
                continue
            self._counters["frames_encoded"] += 1
            for viewer in self.viewers:
                viewer.push(frame, now)

    async def _encoded(self, released: ReleasedFrame, now: float) -> Encoded | None:
        payloads = await self._encoder.encode(self._codec, released, self._next_bitrate(now), now)
        if self._encoder.made_key_frame:
            self._counters["key_frames_asked"] += 1
        return Encoded(payloads, released.ticks, self._is_key_frame(payloads)) if payloads else None

    def _next_bitrate(self, now: float) -> int:
        """What its slowest viewer takes, of those that say so; in steps, for each is a key frame."""
        taken = [(viewer.policy.has_heard, viewer.policy.bitrate(now)) for viewer in self.viewers]
        wanted = min((bitrate for has_heard, bitrate in taken if has_heard), default=self.bitrate)
        if abs(wanted - self.bitrate) >= STEP * self.bitrate and now - self._changed_at >= FALL_INTERVAL_S:
            self.bitrate, self._changed_at = wanted, now
        return self.bitrate

    def _is_key_frame(self, payloads: list[bytes]) -> bool:
        """A change of bitrate or size makes one too, so the stream itself is asked."""
        data = b"".join(depayload(self._codec, payload) for payload in payloads)
        return is_vp8_key_frame(data) if self._codec.name.lower() == "vp8" else is_h264_key_frame(data)


class Lanes:
    """The lanes of one codec and form of the picture."""

    def __init__(
        self,
        codec: RTCRtpCodecParameters,
        settings: MediaSettings,
        executor: Executor,
        counters: Counter[str],
        first_at: float,
    ) -> None:
        self._codec = codec
        self._executor = executor
        self._counters = counters
        self._first_at = first_at
        self._good = self._lane(settings.start_bitrate)
        self._narrow: Lane | None = None

    @property
    def viewers(self) -> set[Pictures]:
        """All of both lanes."""
        return self._good.viewers | (self._narrow.viewers if self._narrow else set())

    def add(self, viewer: Pictures) -> None:
        """Send to this viewer too."""
        self._good.add(viewer)

    def discard(self, viewer: MediaStreamTrack) -> None:
        """Send no more. Harmless when repeated, and of one that is no viewer."""
        for lane in (self._good, self._narrow):
            if lane is not None and isinstance(viewer, Pictures):
                lane.viewers.discard(viewer)

    def push(self, frame: OutgoingFrame, now: float) -> None:
        """Hand a picture to the encoders."""
        self._sort(now)
        self._good.push(frame, now)
        if self._narrow is not None:
            self._narrow.push(frame, now)

    def stop(self) -> None:
        """End the encoders."""
        self._good.stop()
        if self._narrow is not None:
            self._narrow.stop()
            self._narrow = None

    def _lane(self, bitrate: int) -> Lane:
        return Lane(self._codec, self._executor, self._counters, bitrate, self._first_at)

    def _sort(self, now: float) -> None:
        """Put every viewer into the lane that its network takes."""
        viewers = self.viewers
        most = max((viewer.policy.target for viewer in viewers), default=0)
        for viewer in viewers:
            takes, is_narrow = viewer.policy.target, viewer not in self._good.viewers
            if not is_narrow and takes < NARROW * most and viewer.policy.is_limited(now):
                self._good.viewers.discard(viewer)
                if self._narrow is None:
                    self._narrow = self._lane(takes)
                self._narrow.add(viewer)
                self._counters["viewers_to_narrow"] += 1
            elif is_narrow and takes >= WIDE * most and self._narrow is not None:
                self._narrow.viewers.discard(viewer)
                self._good.add(viewer)
                self._counters["viewers_to_good"] += 1
        if self._narrow is not None and not self._narrow.viewers:
            self._narrow.stop()
            self._narrow = None
